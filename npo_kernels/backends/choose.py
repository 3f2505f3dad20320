"""Which backend runs a call: the only place that imports the Triton one."""

import importlib.util

import torch

from npo_kernels.backends import torch as torch_backend
from npo_kernels.core.backend import Backend

# Found once, without importing it: torch.compile cannot trace the search (torch 2.11).
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_impl(impl: str, device: torch.device) -> str:
    """ "auto" is Triton on a GPU that has it, the torch path elsewhere; a name asked for is that or an error."""
    if impl == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if impl == "triton" and not HAS_TRITON:
        raise ValueError(
            "impl='triton' but Triton is not installed: install it (pip install triton), or use impl='torch'"
        )
    if impl == "triton" and device.type != "cuda":
        from npo_kernels.backends.triton import launch

        if not (launch.INTERPRETED and device.type == "cpu"):
            raise ValueError(
                f"impl='triton' runs on a GPU, got tensors on {device}: move them, use impl='torch', or set "
                "TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
            )
    return impl


def backend_of(impl: str) -> Backend:
    """The module of a resolved impl."""
    if impl == "torch":
        return torch_backend
    from npo_kernels.backends import triton as triton_backend

    return triton_backend
