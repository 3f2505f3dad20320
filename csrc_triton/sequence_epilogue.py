"""From rows to sequences, through the log-sigmoid ratio, and back to one factor per row.

    logps_s = sum_{i in s} logp_i
    r_s     = logps_s - offset_s                      NPO: offset = ref_logps         (arXiv 2404.05868, equation 3)
            = logps_s / |y_s| - offset_s              SimNPO: offset = -gamma         (arXiv 2410.07163)
    loss_s  = (2/beta) softplus(beta r_s)
    g_s     = scale_s 2 sigmoid(beta r_s)             (/ |y_s| for SimNPO), the gradient of sum_s scale_s loss_s

and for each row of s, what the gradient products take (`npo_kernels.core.softmax_stats.gradient_coefficients`):

    row_coef_i    = g_s logit_scale prob_scale_i
    target_coef_i = g_s logit_scale miss_i (1 - (z_i / softcap)^2)

Grid: one program per sequence, its rows in blocks of BLOCK_N from its own first row on, so that the sum does not
depend on where in the batch the sequence lies. Moves 24N + 36B bytes. A sequence without rows has logps 0.
"""

import triton
import triton.language as tl

from .common import sigmoid, softplus


@triton.jit
def _sum_rows(logp_ptr, start, end, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        total += tl.load(logp_ptr + rows, mask=rows < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sequence_sums_kernel(
    logp_ptr,  # (N,) float32
    starts_ptr,  # (B+1,) int64
    logps_ptr,  # (B,) float32, out
    BLOCK_N: tl.constexpr,
):
    """The sums alone, in the same order: a reference cached with these has log-ratio exactly 0."""
    sequence = tl.program_id(0)
    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    tl.store(logps_ptr + sequence, _sum_rows(logp_ptr, start, end, BLOCK_N))


@triton.jit
def ratio_epilogue_kernel(
    z_ptr,  # (N,) float32 target logits
    logp_ptr,  # (N,) float32
    miss_ptr,  # (N,) float32
    prob_scale_ptr,  # (N,) float32
    starts_ptr,  # (B+1,) int64
    offset_ptr,  # (B,) float32
    scale_ptr,  # (B,) float32
    logps_ptr,  # (B,) float32, out
    loss_ptr,  # (B,) float32, out
    row_coef_ptr,  # (N,) float32, out
    target_coef_ptr,  # (N,) float32, out
    beta,
    logit_scale,
    softcap,
    LENGTH_NORMALIZED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Everything of the header, one launch."""
    sequence = tl.program_id(0)
    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    logps = _sum_rows(logp_ptr, start, end, BLOCK_N)

    offset = tl.load(offset_ptr + sequence)
    length = 1.0
    if LENGTH_NORMALIZED:
        length = tl.maximum(end - start, 1).to(tl.float32)
    # an infinite reference would make a loss of 0 out of a mistake
    offset = tl.where(tl.abs(offset) == float("inf"), float("nan"), offset)
    scaled_ratio = beta * (logps / length - offset)
    loss = 2.0 / beta * softplus(scaled_ratio)
    grad = tl.load(scale_ptr + sequence) * 2.0 * sigmoid(scaled_ratio) / length
    tl.store(logps_ptr + sequence, logps)
    tl.store(loss_ptr + sequence, loss)

    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside = rows < end
        row_coef = grad * logit_scale * tl.load(prob_scale_ptr + rows, mask=inside, other=0.0)
        target_coef = grad * logit_scale * tl.load(miss_ptr + rows, mask=inside, other=0.0)
        if HAS_SOFTCAP:
            z = tl.load(z_ptr + rows, mask=inside, other=0.0)
            target_coef *= 1.0 - (z / softcap) * (z / softcap)
        # a sequence whose weight has vanished contributes exactly 0
        tl.store(row_coef_ptr + rows, tl.where(grad == 0.0, 0.0, row_coef), mask=inside)
        tl.store(target_coef_ptr + rows, tl.where(grad == 0.0, 0.0, target_coef), mask=inside)
