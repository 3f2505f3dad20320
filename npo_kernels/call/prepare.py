"""From the arguments of a public function to what the operators take: autocast, checks, layout, choice of impl."""

import importlib.util
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from npo_kernels.call.checks import check_batch
from npo_kernels.core.layout import Positions, flatten
from npo_kernels.core.plan import workspace_bytes
from npo_kernels.core.vocab_parallel import Shard, local_head

# Found once, without importing it: torch.compile cannot trace the search (torch 2.11).
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Inputs:
    """A checked call."""

    positions: Positions
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    ignore_index: int
    logit_scale: float
    softcap: float | None
    num_rows: int | None
    workspace_bytes: int
    impl: str  # "triton" | "torch" | "reference"
    shard: Shard | None

    @property
    def num_sequences(self) -> int:
        return self.positions.offsets.shape[0] - 1

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias want a gradient from this call."""
        grad = torch.is_grad_enabled()
        tensors = (self.positions.hidden, self.weight, self.bias)
        return tuple(grad and t is not None and t.requires_grad for t in tensors)

    @property
    def batch_args(self) -> tuple:
        """The leading arguments of the operators."""
        return (self.positions.hidden, self.weight, self.bias, self.positions.targets, self.positions.offsets)

    @property
    def option_args(self) -> tuple:
        """The trailing arguments of the operators."""
        numbers = (self.ignore_index, self.logit_scale, self.softcap, self.num_rows, self.workspace_bytes)
        group, sizes = (None, ()) if self.shard is None else (self.shard.group, self.shard.sizes)
        return (*numbers, group, sizes, self.impl, *self.needs)

    @property
    def reference_options(self) -> dict:
        """The keywords of `reference.token_logps`."""
        return {
            "bias": self.bias,
            "ignore_index": self.ignore_index,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }


def prepare(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    shift: bool,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    impl: str,
    workspace_mb: float | None,
    num_rows: int | None,
    process_group: "dist.ProcessGroup | None",
) -> Inputs:
    """Normalise the arguments that all public functions share, and check them against each other."""
    lm_head_weight, bias, shard = local_head(lm_head_weight, bias, process_group)
    hidden, lm_head_weight, bias = autocast_inputs(hidden, lm_head_weight, bias)
    check_batch(hidden, lm_head_weight, labels, bias, cu_seqlens, impl)
    if shard is not None and impl == "reference":
        raise ValueError("impl='reference' takes the whole head: gather it, or use impl='torch' with process_group")
    positions = flatten(_rows_contiguous(hidden), labels.contiguous(), cu_seqlens, shift, ignore_index)
    return Inputs(
        positions=positions,
        weight=_rows_contiguous(lm_head_weight),
        bias=None if bias is None else bias.contiguous(),
        ignore_index=ignore_index,
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        num_rows=num_rows,
        workspace_bytes=workspace_bytes(workspace_mb, hidden.device),
        impl=resolve_impl(impl, hidden.device),
        shard=shard,
    )


def resolve_impl(impl: str, device: torch.device) -> str:
    """ "auto" is Triton on a GPU that has it, the torch path elsewhere; a name asked for is that or an error."""
    if impl == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if impl == "triton" and not HAS_TRITON:
        raise ValueError(
            "impl='triton' but Triton is not installed: install it (pip install triton), or use impl='torch'"
        )
    if impl == "triton" and device.type != "cuda":
        from npo_kernels.backends.triton import INTERPRETED

        if not (INTERPRETED and device.type == "cpu"):
            raise ValueError(
                f"impl='triton' runs on a GPU, got tensors on {device}: move them, use impl='torch', or set "
                "TRITON_INTERPRET=1 before the first import to interpret the kernels on the CPU"
            )
    return impl


def _rows_contiguous(t: Tensor) -> Tensor:
    """The kernels take any row stride, but the elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def autocast_inputs(hidden, *head):
    """Under torch.autocast everything goes to its dtype, as in torch.nn.functional.linear."""
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return hidden, *head
    dtype = torch.get_autocast_dtype(device)

    def cast(t):
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t

    return tuple(cast(t) for t in (hidden, *head))
