"""Moments of the logits of each row, and the slab of their gradient."""

import torch
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core import matmul
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.row_moments import GradientRows, Moments

# Bytes per logit of a block for float32 temporaries and a mask, by whether there is a softcap.
TEMPORARIES = {False: 13, True: 21}
VECTORS = 6  # moments per row and block


def moment_scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """The logits of BLOCK_N rows of a block with their temporaries, and the moments in float32 and float64."""
    n, columns = min(rows, blocks.BLOCK_N), min(vocab_size, blocks.BLOCK_V)
    upcast = matmul.project_bytes(x, n, columns)
    product = matmul.upcast_bytes(x, vocab_size, x.shape[1])
    projecting = max(TEMPORARIES[capped] * n * columns, 4 * n * columns + upcast, product)
    per_row = (4 + 8 + 8 + 8) * VECTORS * -(-vocab_size // blocks.BLOCK_V) + 4 * x.shape[1] + 200
    return Scratch(projecting, n * x.shape[1] * blocks.ROW_TEMPORARIES, per_row, projecting + rows * per_row)


def row_moments(x: Tensor, head: Head, target: Tensor) -> Moments:
    """`Moments` (blocks, n) of the whole vocabulary; keeps nothing of size V."""
    rows, vocab_size = x.shape[0], head.weight.shape[0]
    count = -(-vocab_size // blocks.BLOCK_V)
    argmax = torch.empty(count, rows, dtype=torch.int64, device=x.device)
    maximum, total, first, second, logits = torch.empty(5, count, rows, dtype=torch.float32, device=x.device)
    for i in range(0, rows, blocks.BLOCK_N):
        some = slice(i, i + blocks.BLOCK_N)
        for number, b in enumerate(range(0, vocab_size, blocks.BLOCK_V)):
            z = blocks.capped_logits(x[some], head.columns(b, min(b + blocks.BLOCK_V, vocab_size)))[0]
            logits[number, some] = z.sum(1)
            maximum[number, some], at = z.max(1)
            argmax[number, some] = at + b
            top = maximum[number, some].unsqueeze(1)
            below = z.sub_(torch.where(top == -torch.inf, 0.0, top))
            e = below.exp()
            blocks.zero_target(e, target[some] - b)
            total[number, some] = e.sum(1)
            below.masked_fill_(e == 0, 0.0)  # avoids 0 * inf
            first[number, some] = e.mul_(below).sum(1)
            second[number, some] = e.mul_(below).sum(1)
            del z, below, e  # free them before the next block is allocated
    return Moments(maximum, argmax, total, first, second, logits)


def moment_gradient(
    x: Tensor, head: Head, target: Tensor, rows: GradientRows, columns: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Slab of the gradient of a vocabulary slice (`GradientRows` has the formula)."""
    begin, end = columns
    slab = blocks.empty_slab(x, columns) if out is None else out
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        some = slice(i, i + blocks.BLOCK_N)
        *vectors, argmax = (vector[some] for vector in rows)
        anchor, center, constant, linear, square, flat = (vector.unsqueeze(1) for vector in vectors)
        for b in range(begin, end, blocks.BLOCK_V):
            stop = min(b + blocks.BLOCK_V, end)
            z, slope = blocks.capped_logits(x[some], head.columns(b, stop))
            c = z.sub_(anchor)
            e = c.exp()
            c.sub_(center).masked_fill_(e == 0, 0.0)  # avoids 0 * inf
            gradient = e.mul_((square * c).add_(linear).mul_(c).add_(constant)).add_(flat)
            for column in (target[some], argmax):
                blocks.zero_target(gradient, column - b)
            slab[some, b - begin : stop - begin] = gradient if slope is None else gradient.mul_(slope)
            del z, slope, c, e, gradient  # free them before the next block is allocated
    return slab
