"""Everything is done in vocabulary blocks of fixed width, aligned to multiples of that width, whatever the workspace:
the partial sums, and with them the log-probabilities, do not depend on it. A block is also what stays in a CPU's cache
between the product, the exponential and the sum.
"""

import torch
from torch import Tensor

from npo_kernels.core import matmul
from npo_kernels.core.lm_head import Head

BLOCK_V = 8192  # columns of one block
BLOCK_N = 256  # rows of one block when nothing has to be kept
ROW_TEMPORARIES = 24  # bytes for each feature of a row where weight and rows meet: six float32 arrays at most


def block_v(x: Tensor) -> int:
    """Columns of one partial sum."""
    return BLOCK_V


def slab_dtype(x: Tensor) -> torch.dtype:
    """What the exponentials are stored in: the input dtype where float32-accumulating products of it exist."""
    return x.dtype if x.is_cuda else torch.float32


def describe(x: Tensor) -> str:
    """The width of the blocks, in one line."""
    return f"PyTorch on {x.device.type}, blocks of {BLOCK_V} columns"


def empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    return torch.empty(x.shape[0], columns[1] - columns[0], dtype=slab_dtype(x), device=x.device)


def logits_block(x: Tensor, head: Head, out: Tensor) -> Tensor:
    """Logits of one block into `out` (rows, columns) float32, before the softcap."""
    if x.dtype == torch.float32:
        torch.mm(x, head.weight.t(), out=out)
    elif x.is_cuda:
        out.copy_(matmul.matmul(x, head.weight.t()))
    else:
        matmul.matmul(x, head.weight.t(), out=out.zero_())
    if head.bias is not None:
        out += head.bias.float()
    if head.logit_scale != 1.0:
        out *= head.logit_scale
    return out


def capped_logits(x: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """(n, columns) float32 logits of some columns, and the derivative of the softcap."""
    z = logits_block(x, head, torch.empty(x.shape[0], head.weight.shape[0], dtype=torch.float32, device=x.device))
    if head.softcap is None:
        return z, None
    t = torch.tanh(z / head.softcap)
    return t * head.softcap, 1 - t * t


def zero_target(e: Tensor, column: Tensor) -> None:
    """e[i, column_i] = 0 where column_i lies inside the block."""
    inside = (column >= 0) & (column < e.shape[1])
    column = column.clamp(0, e.shape[1] - 1).unsqueeze(1)
    kept = e.gather(1, column).squeeze(1)
    e.scatter_(1, column, torch.where(inside, 0.0, kept).unsqueeze(1))
