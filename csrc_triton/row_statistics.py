"""From partial sums and maxima to the log-probability of each row, on (N,) vectors.

With a the anchor, z_y the target logit and s = sum_{v != y} exp(z_v - a), reduced over the splits in order:

    log S = (a - z_y) + log s,    logp = -log1p(S),    miss = 1 - p_y = S / (1 + S)

An anchor is z_y, where S = s and both results keep their relative precision down to the smallest float; or, after the
overflow repair, higher, where S may exceed the float range and only its logarithm is used.

Grid: one program per block of rows. Moves 4-8N * splits bytes in, 8N out.
"""

import triton
import triton.language as tl

from .common import log1p, sigmoid


@triton.jit
def reanchor(
    max_ptr,  # (splits, N) float32
    anchor_ptr,  # (N,) float32
    raised_ptr,  # (N,) float32, out
    dirty_ptr,  # (row blocks,) int32, out: 1 where a row of the block was raised
    N,
    splits,
    headroom,
    BLOCK_N: tl.constexpr,  # that of exp_logits: dirty_ptr has its row blocks
):
    """raised = max(anchor, row maximum - headroom)."""
    row_block = tl.program_id(0)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        part = tl.load(max_ptr + tl.cast(split, tl.int64) * N + rows, mask=inside, other=float("-inf"))
        maximum = tl.maximum(maximum, part)
    anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    # a comparison, not a maximum: the NaN anchor of a poisoned row must stay
    raise_row = inside & (maximum - headroom > anchor)
    tl.store(raised_ptr + rows, tl.where(raise_row, maximum - headroom, anchor), mask=inside)
    tl.store(dirty_ptr + row_block, tl.max(raise_row.to(tl.int32), axis=0))


@triton.jit
def reduce_splits(
    part_ptr,  # (splits, N) float32
    sum_ptr,  # (N,) float32, out
    N,
    splits,
    BLOCK_N: tl.constexpr,
):
    """Sum over the splits, in order."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(part_ptr + tl.cast(split, tl.int64) * N + rows, mask=inside, other=0.0)
    tl.store(sum_ptr + rows, total, mask=inside)


@triton.jit
def row_statistics(
    sum_ptr,  # (N,) float32
    anchor_ptr,  # (N,) float32
    z_ptr,  # (N,) float32 target logits
    logp_ptr,  # (N,) float32, out
    miss_ptr,  # (N,) float32, out
    N,
    BLOCK_N: tl.constexpr,
):
    """logp and miss of each row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    s = tl.load(sum_ptr + rows, mask=inside, other=1.0)
    gap = tl.load(anchor_ptr + rows, mask=inside, other=0.0) - tl.load(z_ptr + rows, mask=inside, other=0.0)
    log_odds = gap + tl.log(s)
    repaired = gap > 0
    logp = tl.where(repaired, -(log_odds + log1p(tl.exp(-tl.abs(log_odds)))), -log1p(s))
    miss = tl.where(repaired, sigmoid(log_odds), s / (1.0 + s))
    tl.store(logp_ptr + rows, logp, mask=inside)
    tl.store(miss_ptr + rows, miss, mask=inside)
