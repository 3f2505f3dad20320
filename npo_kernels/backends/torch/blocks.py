"""Everything is done in vocabulary blocks of fixed width, aligned to multiples of that width, whatever the workspace:
the partial sums, and with them the log-probabilities, do not depend on it. A block is also what stays in a CPU's cache
between the product, the exponential and the sum.
"""

import torch
from torch import Tensor

from npo_kernels.core import cpu, matmul
from npo_kernels.core.lm_head import Head

BLOCK_V = 8192  # columns of one block
BLOCK_N = 256  # rows of one block when nothing has to be kept
CACHED_ROWS = 32  # rows of a block that one thread takes from logits to sums while they are in its cache
ROW_TEMPORARIES = 24  # bytes for each feature of a row where weight and rows meet: six float32 arrays at most


def block_v(x: Tensor) -> int:
    """Columns of one partial sum."""
    return BLOCK_V


def slab_dtype(x: Tensor) -> torch.dtype:
    """What the exponentials are stored in: the input dtype where the device multiplies it, else float32.

    On a CPU with bfloat16 instructions they have the dtype of the gradient products' operands, and those products round
    their float32 sums once (`npo_kernels.core.matmul`); the partial sums are of the exponentials before that.
    """
    return x.dtype if x.is_cuda or cpu.native(x) else torch.float32


def describe(x: Tensor) -> str:
    """The width of the blocks, and on a CPU the arithmetic of the products, in one line."""
    blocks = f"PyTorch on {x.device.type}, blocks of {BLOCK_V} columns"
    return f"{blocks}, {cpu.arithmetic(x.dtype)}" if x.device.type == "cpu" else blocks


def cached_rows(x: Tensor) -> int:
    """Rows that all threads together take from logits to sums at a time."""
    return max(1, x.shape[0]) if x.is_cuda else CACHED_ROWS * torch.get_num_threads()


def empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """Room for the exponentials of a vocabulary slice."""
    return torch.empty(x.shape[0], columns[1] - columns[0], dtype=slab_dtype(x), device=x.device)


def logits_block(x: Tensor, head: Head, out: Tensor) -> Tensor:
    """Logits of one block into `out` (rows, columns) float32, before the softcap."""
    matmul.project(x, head.weight, out)
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


def zero_target(e: Tensor, column: Tensor) -> Tensor:
    """e[i, column_i] = 0 where column_i lies inside the block; returns what was there, 0 where it does not."""
    inside = (column >= 0) & (column < e.shape[1])
    column = column.clamp(0, e.shape[1] - 1).unsqueeze(1)
    kept = e.gather(1, column).squeeze(1)
    e.scatter_(1, column, torch.where(inside, 0.0, kept).unsqueeze(1))
    return torch.where(inside, kept, 0.0)
