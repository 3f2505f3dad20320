"""Statistics of each row from the partial sums and maxima of the splits, as (N,) vectors.

Let a be the anchor, z_y the target logit and s = sum_{v != y} exp(z_v - a). The splits are added in order, so the
result does not depend on how the vocabulary was sliced.

    p_v = prob_scale exp(z_v - a),    prob_scale = 1 / (s + exp(z_y - a))
    miss = 1 - p_y = s prob_scale
    logp = -log1p(s) at a = z_y;  (z_y - a) + log prob_scale at an anchor raised by the overflow repair

There is no cancellation: at a = z_y, miss and logp keep their relative precision down to the smallest float. prob_scale
is not computed from logp, whose absolute error at -160 is 1e-5.

Grid: one program per block of rows. reanchor_kernel reads 4N * splits + 4N bytes and writes 4N; row_statistics_kernel
reads 4N * splits + 8N bytes and writes 12N.
"""

import triton
import triton.language as tl

from .common import log1p


@triton.jit
def reanchor_kernel(
    max_ptr,  # (splits, N) float32
    anchor_ptr,  # (N,) float32
    raised_ptr,  # (N,) float32, out
    dirty_ptr,  # (row blocks,) int32, out: 1 if any row of the block was raised
    N,
    splits,
    headroom,
    BLOCK_N: tl.constexpr,  # must equal BLOCK_N of exp_logits_kernel, whose row blocks dirty_ptr describes
):
    """raised = max(anchor, row maximum - headroom); a NaN anchor stays NaN."""
    row_block = tl.program_id(0)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        part = tl.load(max_ptr + tl.cast(split, tl.int64) * N + rows, mask=inside, other=float("-inf"))
        maximum = tl.maximum(maximum, part)
    anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    # a comparison instead of tl.maximum, so that the NaN anchor of a poisoned row stays NaN
    raise_row = inside & (maximum - headroom > anchor)
    tl.store(raised_ptr + rows, tl.where(raise_row, maximum - headroom, anchor), mask=inside)
    tl.store(dirty_ptr + row_block, tl.max(raise_row.to(tl.int32), axis=0))


@triton.jit
def row_statistics_kernel(
    part_ptr,  # (splits, N) float32
    anchor_ptr,  # (N,) float32
    z_ptr,  # (N,) float32 target logits
    logp_ptr,  # (N,) float32, out
    miss_ptr,  # (N,) float32, out
    prob_scale_ptr,  # (N,) float32, out
    N,
    splits,
    BLOCK_N: tl.constexpr,
):
    """logp, miss and prob_scale of each row."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in range(0, splits):
        s += tl.load(part_ptr + tl.cast(split, tl.int64) * N + rows, mask=inside, other=1.0)
    below = tl.load(z_ptr + rows, mask=inside, other=0.0) - tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    total = s + tl.exp(below)
    logp = tl.where(below < 0, below - tl.log(total), -log1p(s))
    tl.store(logp_ptr + rows, logp, mask=inside)
    tl.store(miss_ptr + rows, s / total, mask=inside)
    tl.store(prob_scale_ptr + rows, 1.0 / total, mask=inside)
