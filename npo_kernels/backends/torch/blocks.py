"""Vocabulary blocks, the unit of work of the PyTorch backend.

Blocks have a fixed width and are aligned to multiples of it, whatever the workspace is, so the partial sums and the
log-probabilities do not depend on the workspace. On a CPU, the rows of a block that are processed together stay in the
cache between the product, the exponential and the sum.
"""

import torch
from torch import Tensor

from npo_kernels.core import cpu, matmul
from npo_kernels.core.lm_head import Head

BLOCK_V = 8192  # columns of one block
BLOCK_N = 256  # rows of one block when no slab is kept
CACHED_ROWS = 32  # rows of a block that one thread takes from logits to sums while they are in its cache
ROW_TEMPORARIES = 24  # bytes per feature of a row where rows are combined with the weight: at most six float32 arrays


def block_v(x: Tensor) -> int:
    """Columns of one partial sum."""
    return BLOCK_V


def slab_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the stored exponentials: that of x if the device multiplies it natively, else float32.

    On a CPU with bfloat16 instructions, gradient products of bfloat16 operands round their float32 sums once
    (`npo_kernels.core.matmul`). The partial sums are taken of the exponentials before they are rounded to this dtype.
    """
    return x.dtype if x.is_cuda or cpu.native(x) else torch.float32


def describe(x: Tensor) -> str:
    """One line with the block width and, on a CPU, the arithmetic of the products."""
    blocks = f"PyTorch on {x.device.type}, blocks of {BLOCK_V} columns"
    return f"{blocks}, {cpu.arithmetic(x.dtype)}" if x.device.type == "cpu" else blocks


def cached_rows(x: Tensor) -> int:
    """Number of rows that all threads together take from logits to sums at a time."""
    return max(1, x.shape[0]) if x.is_cuda else CACHED_ROWS * torch.get_num_threads()


def empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """An uninitialized slab for the exponentials of a vocabulary slice."""
    return torch.empty(x.shape[0], columns[1] - columns[0], dtype=slab_dtype(x), device=x.device)


def logits_block(x: Tensor, head: Head, out: Tensor) -> Tensor:
    """Write the logits of one block, before the softcap, to `out` (rows, columns) float32."""
    matmul.project(x, head.weight, out)
    if head.bias is not None:
        out += head.bias.float()
    if head.logit_scale != 1.0:
        out *= head.logit_scale
    return out


def capped_logits(x: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """((n, columns) float32 logits for the columns of `head`, derivative of the softcap or None)."""
    z = logits_block(x, head, torch.empty(x.shape[0], head.weight.shape[0], dtype=torch.float32, device=x.device))
    if head.softcap is None:
        return z, None
    t = torch.tanh(z / head.softcap)
    return t * head.softcap, 1 - t * t


def zero_target(e: Tensor, column: Tensor) -> Tensor:
    """Set e[i, column_i] = 0 if column_i lies inside the block; return the old values, 0 for rows without one."""
    inside = (column >= 0) & (column < e.shape[1])
    column = column.clamp(0, e.shape[1] - 1).unsqueeze(1)
    kept = e.gather(1, column).squeeze(1)
    e.scatter_(1, column, torch.where(inside, 0.0, kept).unsqueeze(1))
    return torch.where(inside, kept, 0.0)
