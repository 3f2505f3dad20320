"""Select the backend of a call. No other module imports the Triton backend."""

import importlib.util

import torch

from npo_kernels.backends import torch as torch_backend
from npo_kernels.core.backend import Backend

# Looked up once at import, without importing Triton: torch.compile (2.11) cannot trace find_spec.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_impl(impl: str, device: torch.device) -> str:
    """The backend for `impl`: "auto" is "triton" on a GPU if Triton is installed, else "torch".

    A name passed by the caller is returned as it is; ValueError if it cannot run here.
    """
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
    """The backend module of a resolved impl."""
    if impl == "torch":
        return torch_backend
    from npo_kernels.backends import triton as triton_backend

    return triton_backend
