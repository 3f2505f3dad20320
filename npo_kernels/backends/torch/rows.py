"""From statistics of rows to sequences and back, and the gradients' terms of size N x H."""

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import DEAD_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics, gradient_coefficients

SCALED_ROWS = 256  # of a gradient at a time, on a CPU: the float32 copies of so many


def scale_rows(x: Tensor, scale: Tensor, sign: float = 1.0) -> Tensor:
    """sign * scale_i * x_i, rounded once to the dtype the gradient products take; a row of scale 0 is exactly 0."""
    out = torch.empty(x.shape, dtype=blocks.slab_dtype(x), device=x.device)
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        factor = sign * scale[i : i + blocks.BLOCK_N].unsqueeze(1)
        out[i : i + blocks.BLOCK_N] = torch.where(factor == 0, 0.0, x[i : i + blocks.BLOCK_N] * factor)
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
    """out[index_i] = target_coef_i W[target_i] - row_coef_i product_i; filling rows are not written."""
    label = target.clamp(0, head.weight.shape[0] - 1)
    for i in range(0, product.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        here = torch.where(target[rows] >= 0, target_coef[rows], 0.0)
        grad = here.unsqueeze(1) * head.weight[label[rows]].float() - row_coef[rows].unsqueeze(1) * product[rows]
        # filling rows share index 0 with a real one: add zero instead of overwriting
        live = (target[rows] != DEAD_ROW).unsqueeze(1)
        out.index_add_(0, index[rows], torch.where(live, grad, 0.0).to(out.dtype))


def group_targets(target: Tensor) -> Tensor:
    """What `add_targets` needs to know about the labels; computed once a call."""
    return target


def add_targets(grad: Tensor, x: Tensor, coef: Tensor, targets: Tensor, columns: tuple[int, int]) -> None:
    """grad[y_i - begin] += coef_i x_i in float32 for the rows whose target lies in the slice [begin, end)."""
    begin, end = columns
    inside = (targets >= begin) & (targets < end)
    column = (targets - begin).clamp(0, end - begin - 1)
    if x.device.type == "cpu":  # a GPU would have to wait for their number
        found = inside.nonzero().squeeze(1)
        x, coef, column, inside = x[found], coef[found], column[found], inside[found]
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        update = torch.where(inside[rows], coef[rows], 0.0).unsqueeze(1) * x[rows].float()
        _add_rows(grad, column[rows], update)


def sequence_sums(values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
    """(n,) row values -> (B,) sums in row order; rows of sequence B (filling) are left out."""
    num_sequences = starts.shape[0] - 1
    sums = torch.zeros(num_sequences + 1, dtype=torch.float32, device=values.device)
    _add_rows(sums, sequence, values)
    return sums[:num_sequences]


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index_i] += rows_i, in row order on every device: on CUDA index_add_ promises no order, index_put_ does."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)


def coefficients(
    stats: Statistics,
    rows: Rows,
    grad_tokens: Tensor | None,  # (T,)
    grad_logps: Tensor | None,  # (B,)
    head: Head,
) -> tuple[Tensor, Tensor]:
    """(row_coef (n,), target_coef (n,)) from the upstream gradients of log-probabilities."""
    grad = torch.zeros_like(stats.logp)
    if grad_tokens is not None:
        grad += torch.where(rows.target != DEAD_ROW, grad_tokens[rows.index], 0.0)
    if grad_logps is not None:  # a filling row reads the zero past the last sequence
        grad += F.pad(grad_logps, (0, 1))[rows.sequence]
    return gradient_coefficients(stats, grad, head)


def ratio_epilogue(
    stats: Statistics,
    sequence: Tensor,  # (n,) sequence of each row, counted from the first of the chunk
    starts: Tensor,  # (B+1,) first row of each sequence, counted from the first of the chunk
    ratio: RatioLoss,  # of the sequences of the chunk
    head: Head,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)): from rows to sequences, the loss, and back."""
    logps = sequence_sums(stats.logp, sequence, starts)
    losses, grad = ratio.value_and_grad(logps)
    row_coef, target_coef = gradient_coefficients(stats, F.pad(grad, (0, 1))[sequence], head)
    return logps, losses, row_coef, target_coef


def scale_gradient(grad: Tensor, unit: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * unit (a factor of each row, or none) * upstream (0-d) in float32, rounded once to `dtype`.

    A GPU casts operands and result inside the product; a CPU copies them in float32, so there it is done some rows at
    a time.
    """
    factor = upstream.float() if unit is None else upstream.float() * unit
    # as many dimensions as grad has: the dtype of a 0-d factor would yield to that of grad
    factor = factor.reshape(-1, *[1] * (grad.dim() - 1))
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    step = max(1, grad.shape[0]) if grad.is_cuda else SCALED_ROWS
    for i in range(0, grad.shape[0], step):
        rows = slice(i, i + step)
        torch.mul(grad[rows], factor if unit is None else factor[rows], out=out[rows])
    return out
