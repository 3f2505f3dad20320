"""From rows to sequences, through the NPO or SimNPO loss, and back to two gradient coefficients per row.

    logps_s = sum_{i in s} logp_i
    r_s     = logps_s - offset_s                      NPO: offset = ref_logps         (arXiv 2404.05868, equation 3)
            = logps_s / |y_s| - offset_s              SimNPO: offset = -gamma         (arXiv 2410.07163)
    loss_s  = (2/beta) softplus(beta r_s)
    g_s     = scale_s 2 sigmoid(beta r_s)             (/ |y_s| for SimNPO), the gradient of sum_s scale_s loss_s

and for each row of s the coefficients of the gradient products (`npo_kernels.core.softmax_stats.gradient_coefficients`)

    row_coef_i    = g_s logit_scale prob_scale_i
    target_coef_i = g_s logit_scale miss_i (1 - (z_i / softcap)^2)

Grid: one program per sequence, plus one for the padding rows after the last sequence, whose coefficients are 0. A
program reads the rows of its sequence in blocks of BLOCK_N from the first row on, so the sum does not depend on the
position of the sequence in the batch. Moves 24N + 32B bytes. A sequence without rows has logps 0.
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
    """Only the sums, in the order of `ratio_epilogue_kernel`: with ref_logps from it the log-ratio is exactly 0."""
    sequence = tl.program_id(0)
    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    tl.store(logps_ptr + sequence, _sum_rows(logp_ptr, start, end, BLOCK_N))


@triton.jit
def _store_coefficients(
    rows, inside, grad, z_ptr, miss_ptr, prob_scale_ptr, row_coef_ptr, target_coef_ptr, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Store row_coef and target_coef of some rows, given the gradient of their log-probabilities."""
    row_coef = grad * logit_scale * tl.load(prob_scale_ptr + rows, mask=inside, other=0.0)
    target_coef = grad * logit_scale * tl.load(miss_ptr + rows, mask=inside, other=0.0)
    if HAS_SOFTCAP:
        z = tl.load(z_ptr + rows, mask=inside, other=0.0)
        target_coef *= 1.0 - (z / softcap) * (z / softcap)
    # a sequence of weight 0 contributes exactly 0, even if its statistics are not finite
    tl.store(row_coef_ptr + rows, tl.where(grad == 0.0, 0.0, row_coef), mask=inside)
    tl.store(target_coef_ptr + rows, tl.where(grad == 0.0, 0.0, target_coef), mask=inside)


@triton.jit
def coefficients_kernel(
    z_ptr,  # (N,) float32 target logits
    miss_ptr,  # (N,) float32
    prob_scale_ptr,  # (N,) float32
    index_ptr,  # (N,) int64 position of each row
    target_ptr,  # (N,) int64; -1: padding row
    sequence_ptr,  # (N,) int64
    token_grad_ptr,  # (T,) float32
    logps_grad_ptr,  # (B,) float32
    row_coef_ptr,  # (N,) float32, out
    target_coef_ptr,  # (N,) float32, out
    N,
    logit_scale,
    softcap,
    HAS_TOKENS: tl.constexpr,
    HAS_LOGPS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """row_coef and target_coef for g_i = token_grad[index_i] + logps_grad[sequence_i], 0 for padding rows.

    Grid: blocks of rows. Moves 40N bytes for either upstream gradient, 52N bytes for both.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    live = inside & (tl.load(target_ptr + rows, mask=inside, other=-1) != -1)
    grad = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_TOKENS:
        grad += tl.load(token_grad_ptr + tl.load(index_ptr + rows, mask=live, other=0), mask=live, other=0.0)
    if HAS_LOGPS:
        grad += tl.load(logps_grad_ptr + tl.load(sequence_ptr + rows, mask=live, other=0), mask=live, other=0.0)
    _store_coefficients(
        rows, inside, grad, z_ptr, miss_ptr, prob_scale_ptr, row_coef_ptr, target_coef_ptr, logit_scale, softcap,
        HAS_SOFTCAP,
    )  # fmt: skip


@triton.jit
def sequence_scale_kernel(
    num_tokens_ptr,  # (B,) int64
    normalizer_ptr,  # () float32
    weights_ptr,  # (B,) float32
    scale_ptr,  # (B,) float32, out
    B,
    MEAN: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`npo_kernels.core.formulas.sequence_scale`: the factor of each sequence's loss.

    1 for a sequence with rows, 0 for the others. A mean divides it by the number of sequences with rows, or by the
    normalizer, and it is multiplied by the weight. A normalizer that is not positive and finite makes all factors NaN,
    and a weight that is negative or not finite makes its own factor NaN. Grid: one program. Moves 16B bytes (24B for a
    mean without normalizer).
    """
    divisor = 1.0
    if HAS_NORMALIZER:
        divisor = tl.load(normalizer_ptr)
        divisor = tl.where((divisor > 0.0) & (divisor < float("inf")), divisor, float("nan"))
    elif MEAN:
        count = tl.zeros((BLOCK_N,), dtype=tl.int32)
        for first in range(0, B, BLOCK_N):
            sequences = first + tl.arange(0, BLOCK_N)
            count += (tl.load(num_tokens_ptr + sequences, mask=sequences < B, other=0) > 0).to(tl.int32)
        divisor = tl.maximum(tl.sum(count, axis=0), 1).to(tl.float32)
    for first in range(0, B, BLOCK_N):
        sequences = first + tl.arange(0, BLOCK_N)
        scored = (tl.load(num_tokens_ptr + sequences, mask=sequences < B, other=0) > 0).to(tl.float32)
        scale = tl.div_rn(scored, divisor)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + sequences, mask=sequences < B, other=0.0)
            weight = tl.where((weight >= 0.0) & (weight < float("inf")), weight, float("nan"))
            scale = tl.where(scored == 0.0, scale, scale * weight)
        tl.store(scale_ptr + sequences, scale, mask=sequences < B)


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
    loss_ptr,  # (B,) float32, out: scale_s loss_s
    row_coef_ptr,  # (N,) float32, out
    target_coef_ptr,  # (N,) float32, out
    B,
    N,
    beta,
    logit_scale,
    softcap,
    LENGTH_NORMALIZED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All formulas of the module docstring in one launch. Grid: B + 1."""
    sequence = tl.program_id(0)
    if sequence == B:
        zeros = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(tl.load(starts_ptr + B), N, BLOCK_N):
            rows = first + tl.arange(0, BLOCK_N)
            tl.store(row_coef_ptr + rows, zeros, mask=rows < N)
            tl.store(target_coef_ptr + rows, zeros, mask=rows < N)
        return
    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    logps = _sum_rows(logp_ptr, start, end, BLOCK_N)

    offset = tl.load(offset_ptr + sequence)
    length = 1.0
    if LENGTH_NORMALIZED:
        length = tl.maximum(end - start, 1).to(tl.float32)
    # an infinite ref_logps is a mistake that would otherwise give a loss of 0
    offset = tl.where(tl.abs(offset) == float("inf"), float("nan"), offset)
    scaled_ratio = beta * (logps / length - offset)
    loss = 2.0 / beta * softplus(scaled_ratio)
    scale = tl.load(scale_ptr + sequence)
    # with scale 0 the reference may be anything, but a NaN log-probability is a mistake that must stay visible
    grad = tl.where(scale == 0.0, 0.0, scale * 2.0 * sigmoid(scaled_ratio) / length)
    tl.store(logps_ptr + sequence, logps)
    tl.store(loss_ptr + sequence, tl.where((scale == 0.0) & (logps == logps), 0.0, scale * loss))

    for first in range(start, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        _store_coefficients(
            rows, rows < end, grad, z_ptr, miss_ptr, prob_scale_ptr, row_coef_ptr, target_coef_ptr, logit_scale,
            softcap, HAS_SOFTCAP,
        )  # fmt: skip
