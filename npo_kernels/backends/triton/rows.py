"""Launches of the kernels for rows and sequences: sums, the loss, and the gradient terms of size N x H."""

import torch
from torch import Tensor

from csrc_triton.gradient_rows import (
    add_targets_kernel,
    finish_hidden_grad_kernel,
    scale_gradient_kernel,
    scale_rows_kernel,
)
from csrc_triton.sequence_epilogue import (
    coefficients_kernel,
    ratio_epilogue_kernel,
    sequence_scale_kernel,
    sequence_sums_kernel,
)
from csrc_triton.tiles import BLOCK_ROWS, BLOCK_RUN, BLOCK_SCALED, ROW_WARPS
from npo_kernels.backends.triton import launch
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics


def sequence_sums(values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
    """(n,) row values -> (B,) sums."""
    logps = torch.empty(starts.shape[0] - 1, dtype=torch.float32, device=values.device)
    if logps.shape[0]:
        sequence_sums_kernel[logps.shape](values, starts, logps, BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS)
    return logps


def coefficients(
    stats: Statistics, rows: Rows, grad_tokens: Tensor | None, grad_logps: Tensor | None, head: Head
) -> tuple[Tensor, Tensor]:
    """(row_coef (n,), target_coef (n,)) from the upstream gradients of the log-probabilities, in one launch."""
    row_coef, target_coef = torch.empty_like(stats.logp), torch.empty_like(stats.logp)
    grad_tokens = None if grad_tokens is None else grad_tokens.contiguous()
    grad_logps = None if grad_logps is None else grad_logps.contiguous()
    if row_coef.shape[0]:
        coefficients_kernel[launch.row_grid(row_coef.shape[0])](
            stats.target_logit, stats.miss, stats.prob_scale, rows.index, rows.target, rows.sequence,
            grad_tokens, grad_logps, row_coef, target_coef, row_coef.shape[0], head.logit_scale, head.softcap or 0.0,
            HAS_TOKENS=grad_tokens is not None, HAS_LOGPS=grad_logps is not None,
            HAS_SOFTCAP=head.softcap is not None, BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
    return row_coef, target_coef


def ratio_epilogue(
    stats: Statistics, sequence: Tensor, starts: Tensor, ratio: RatioLoss, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)) in one launch."""
    logps, losses = torch.empty_like(ratio.offset), torch.empty_like(ratio.offset)
    row_coef, target_coef = torch.empty_like(stats.logp), torch.empty_like(stats.logp)
    num_sequences = logps.shape[0]
    ratio_epilogue_kernel[(num_sequences + 1,)](  # one more for the padding rows
        stats.target_logit, stats.logp, stats.miss, stats.prob_scale, starts, ratio.offset, ratio.scale,
        logps, losses, row_coef, target_coef, num_sequences, stats.logp.shape[0],
        ratio.beta, head.logit_scale, head.softcap or 0.0,
        LENGTH_NORMALIZED=ratio.length_normalized, HAS_SOFTCAP=head.softcap is not None,
        BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
    )  # fmt: skip
    return logps, losses, row_coef, target_coef


def sequence_scale(
    num_tokens: Tensor, reduction: str, normalizer: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """(B,) factor of each sequence's loss (`npo_kernels.core.formulas.sequence_scale`)."""
    scale = torch.empty(num_tokens.shape, dtype=torch.float32, device=num_tokens.device)
    sequence_scale_kernel[(1,)](
        num_tokens, normalizer, weights, scale, scale.shape[0],
        MEAN=reduction == "mean", HAS_NORMALIZER=reduction == "mean" and normalizer is not None,
        HAS_WEIGHTS=weights is not None,
        BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
    )  # fmt: skip
    return scale


def scale_rows(x: Tensor, scale: Tensor, sign: float = 1.0) -> Tensor:
    """sign * scale_i * x_i, rounded once to the dtype of x."""
    x = launch.rows_contiguous(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        block = launch.hidden_block(x.shape[1])
        scale_rows_kernel[launch.hidden_grid(x.shape)](
            x, scale, out, x.shape[1], x.stride(0), sign, BLOCK_H=block, num_warps=ROW_WARPS
        )
    return out


def finish_hidden_grad(
    product: Tensor,  # (n, H) float32: E @ W
    row_coef: Tensor,  # (n,)
    target_coef: Tensor,  # (n,)
    head: Head,
    target: Tensor,  # (n,)
    index: Tensor,  # (n,) rows of `out`
    out: Tensor,  # (T, H)
) -> None:
    """out[index_i] = target_coef_i W[target_i] - row_coef_i product_i; padding rows are not written."""
    if product.shape[0]:
        weight = launch.rows_contiguous(head.weight)
        finish_hidden_grad_kernel[launch.hidden_grid(product.shape)](
            product, row_coef, target_coef, target, index, weight, out, weight.shape[0], product.shape[1],
            weight.stride(0), BLOCK_H=launch.hidden_block(product.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip


def group_targets(target: Tensor) -> tuple[Tensor, Tensor]:
    """(targets in ascending order, rows in that order), so that one program can sum all rows of a label."""
    return torch.sort(target, stable=True)


def add_targets(
    grad: Tensor, x: Tensor, coef: Tensor, targets: tuple[Tensor, Tensor], columns: tuple[int, int]
) -> None:
    """grad[y_i - begin] += coef_i x_i in float32 for the rows whose target lies in the slice [begin, end)."""
    if x.shape[0]:
        x = launch.rows_contiguous(x)
        add_targets_kernel[launch.hidden_grid(x.shape)](
            grad, x, coef, *targets, x.shape[0], columns[1] - columns[0], x.shape[1], columns[0],
            x.stride(0), grad.stride(0), BLOCK_RUN=BLOCK_RUN, BLOCK_H=launch.hidden_block(x.shape[1]),
            num_warps=ROW_WARPS,
        )  # fmt: skip


def scale_gradient(
    grad: Tensor, unit: Tensor | None, upstream: Tensor, dtype: torch.dtype, in_place: bool = False
) -> Tensor:
    """grad * unit (a factor per row, or None) * upstream (0-d) in float32, rounded once to `dtype`."""
    grad, unit = grad.contiguous(), None if unit is None else unit.contiguous()
    out = grad if in_place and grad.dtype == dtype else torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel():
        scale_gradient_kernel[(launch.cdiv(grad.numel(), BLOCK_SCALED),)](
            grad, unit, upstream, out, grad.numel(), grad[0].numel(), HAS_UNIT=unit is not None, BLOCK=BLOCK_SCALED,
            num_warps=ROW_WARPS,
        )  # fmt: skip
    return out
