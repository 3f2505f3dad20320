"""KL divergence of a model and a reference, and its gradient, from blocks of both sets of logits."""

import torch
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core import matmul
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import Divergence, Lowered

KL_TEMPORARIES = 10  # float32 arrays of the size of a block's logits


def kl_scratch(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
    """The logits of both models for blocks.BLOCK_N rows, and the temporaries of the sums."""
    vocab_size = head.weight.shape[0]
    n, columns = min(x.shape[0], blocks.BLOCK_N), min(vocab_size, blocks.BLOCK_V)
    upcast = max(matmul.project_bytes(t, n, columns) for t in (x, ref_x))
    product = matmul.upcast_bytes(x, vocab_size, x.shape[1])
    block = 4 * n * columns
    temporaries = KL_TEMPORARIES + (2 if head.softcap is not None else 0)
    # operands are copied before most of the temporaries exist
    projecting = max(temporaries * block, (temporaries - 8) * block + upcast, product)
    per_row = 12 * -(-vocab_size // blocks.BLOCK_V) + 400  # vectors of both softmaxes, in float64 while computed
    return Scratch(projecting, n * x.shape[1] * blocks.ROW_TEMPORARIES, per_row, projecting + x.shape[0] * per_row)


def softmax_sums(x: Tensor, head: Head, beside: Tensor, lowered: Lowered | None) -> tuple[Tensor, Tensor]:
    """(maxima, sums of exp(z - maximum)), (blocks, n) float32 each, over the whole vocabulary.

    The blocks are those of `kl_logits`, so the logits are bitwise equal in both.
    """
    vocab_size = head.weight.shape[0]
    maxima, sums = torch.empty(2, -(-vocab_size // blocks.BLOCK_V), x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        for number, b in enumerate(range(0, vocab_size, blocks.BLOCK_V)):
            z, _ = blocks.capped_logits(x[rows], head.columns(b, min(b + blocks.BLOCK_V, vocab_size)))
            maxima[number, rows] = z.amax(1) if lowered is None else _lowered_maxima(z, lowered.rows(rows), b)
            z.sub_(maxima[number, rows].unsqueeze(1))
            if lowered is not None:
                _lower(z, lowered.rows(rows), b)
            sums[number, rows] = z.exp_().sum(1)
    return maxima, sums


def _at_target(z: Tensor, lowered: Lowered, begin: int) -> tuple[Tensor, Tensor]:
    """(column, shift), (n, 1) each: where each row's target lies in the block z, which starts at vocabulary column
    `begin`, and the shift to subtract there. The shift is 0, at an arbitrary column, if the target is outside the
    block."""
    column = lowered.target - begin
    inside = (column >= 0) & (column < z.shape[1])
    return column.clamp(0, z.shape[1] - 1).unsqueeze(1), (inside.to(z.dtype) * lowered.shift).unsqueeze(1)


def _lower(z: Tensor, lowered: Lowered, begin: int) -> None:
    """Subtract the shift at the targets that lie in the block, in place."""
    column, shift = _at_target(z, lowered, begin)
    z.scatter_(1, column, z.gather(1, column) - shift)


def _lowered_maxima(z: Tensor, lowered: Lowered, begin: int) -> Tensor:
    """(n,) row maxima of the lowered block; z is restored afterwards."""
    column, shift = _at_target(z, lowered, begin)
    picked = z.gather(1, column)
    maxima = z.scatter_(1, column, picked - shift).amax(1)
    z.scatter_(1, column, picked)
    return maxima


def kl_logits(
    x: Tensor,
    head: Head,
    ref_x: Tensor,
    ref_head: Head,
    divergence: Divergence,
    columns: tuple[int, int],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(slab, partial sums of KL); the slab is the gradient of the slice times the derivative of the softcap."""
    slab = blocks.empty_slab(x, columns) if out is None else out
    return slab, _kl(x, head, ref_x, ref_head, divergence, columns, slab)


def kl_sums(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, divergence: Divergence) -> Tensor:
    """Partial sums of KL over the whole vocabulary; keeps nothing of size V."""
    return _kl(x, head, ref_x, ref_head, divergence, (0, head.weight.shape[0]), slab=None)


def _kl(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary, as is ref_head
    ref_x: Tensor,  # (n, H_ref)
    ref_head: Head,
    divergence: Divergence,
    columns: tuple[int, int],  # the vocabulary slice
    slab: Tensor | None,  # written, if given
) -> Tensor:
    """Partial sums of KL (blocks, n)."""
    begin, end = columns
    parts = torch.empty(-(-(end - begin) // blocks.BLOCK_V), x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        anchor, scale, ref_anchor, ref_scale, shift = (vector[rows].unsqueeze(1) for vector in divergence.vectors)
        for number, b in enumerate(range(begin, end, blocks.BLOCK_V)):
            stop = min(b + blocks.BLOCK_V, end)
            z, slope = blocks.capped_logits(x[rows], head.columns(b, stop))
            ref_z, _ = blocks.capped_logits(ref_x[rows], ref_head.columns(b, stop))
            below, ref_below = z.sub_(anchor), ref_z.sub_(ref_anchor)
            if divergence.lowered is not None:
                _lower(ref_below, divergence.lowered.rows(rows), b)
            d = (below - ref_below).sub_(shift)
            p, q = below.exp_().mul_(scale), ref_below.exp_().mul_(ref_scale)
            parts[number, rows] = (_terms(-d, p, q) if divergence.reverse else _terms(d, q, p)).sum(1)
            if slab is not None:
                if divergence.reverse:
                    assert divergence.kl is not None
                    gradient = d.sub_(divergence.kl[rows].unsqueeze(1)).mul_(p)
                else:
                    gradient = torch.where(d.abs() < 0.5, q * torch.expm1(d), p - q)
                slab[rows, b - begin : stop - begin] = gradient if slope is None else gradient.mul_(slope)
                del gradient
            del z, ref_z, below, ref_below, d, p, q, slope  # free them before the next block is allocated
    return parts


def _terms(d: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """q (exp(d) - 1 - d) for p = q exp(d)."""
    return torch.where(d.abs() < 0.5, q * _expm1_minus(d), p - q - q * d)


def _expm1_minus(d: Tensor) -> Tensor:
    """exp(d) - 1 - d for |d| < 1/2, by its series, with a relative truncation error below 1e-8."""
    tail = torch.zeros_like(d)
    for k in (40320, 5040, 720, 120, 24, 6, 2):
        tail = tail * d + 1.0 / k
    return d * d * tail
