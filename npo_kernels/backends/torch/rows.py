"""From row statistics to sequences and back, and the gradient terms of size N x H."""

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import PADDING_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics, gradient_coefficients

SCALED_ROWS = 256  # rows of a gradient that `scale_gradient` processes at a time on a CPU, which copies them to float32


def scale_rows(x: Tensor, scale: Tensor, sign: float = 1.0) -> Tensor:
    """sign * scale_i * x_i, rounded once to the dtype of the slab; a row of scale 0 is exactly 0."""
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
    """out[index_i] = target_coef_i W[target_i] - row_coef_i product_i; padding rows are not written."""
    label = target.clamp(0, head.weight.shape[0] - 1)
    for i in range(0, product.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        here = torch.where(target[rows] >= 0, target_coef[rows], 0.0)
        grad = here.unsqueeze(1) * head.weight[label[rows]].float() - row_coef[rows].unsqueeze(1) * product[rows]
        # padding rows have index 0, which may belong to a real row: add zero instead of overwriting it
        live = (target[rows] != PADDING_ROW).unsqueeze(1)
        out.index_add_(0, index[rows], torch.where(live, grad, 0.0).to(out.dtype))


def group_targets(target: Tensor) -> Tensor:
    """Prepare the labels for `add_targets`, once per call; nothing to do here."""
    return target


def add_targets(grad: Tensor, x: Tensor, coef: Tensor, targets: Tensor, columns: tuple[int, int]) -> None:
    """grad[y_i - begin] += coef_i x_i in float32 for the rows whose target lies in the slice [begin, end)."""
    begin, end = columns
    inside = (targets >= begin) & (targets < end)
    column = (targets - begin).clamp(0, end - begin - 1)
    if x.device.type == "cpu":  # on a GPU, nonzero() would force a device sync
        found = inside.nonzero().squeeze(1)
        x, coef, column, inside = x[found], coef[found], column[found], inside[found]
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        update = torch.where(inside[rows], coef[rows], 0.0).unsqueeze(1) * x[rows].float()
        _add_rows(grad, column[rows], update)


def sequence_sums(values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
    """(n,) row values -> (B,) sums in row order; padding rows (sequence B) are left out."""
    num_sequences = starts.shape[0] - 1
    sums = torch.zeros(num_sequences + 1, dtype=torch.float32, device=values.device)
    _add_rows(sums, sequence, values)
    return sums[:num_sequences]


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index_i] += rows_i, in row order on every device: on CUDA only index_put_ guarantees the order."""
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
    """(row_coef (n,), target_coef (n,)) from the upstream gradients of the log-probabilities."""
    grad = torch.zeros_like(stats.logp)
    if grad_tokens is not None:
        grad += torch.where(rows.target != PADDING_ROW, grad_tokens[rows.index], 0.0)
    if grad_logps is not None:  # padding rows read the zero after the last sequence
        grad += F.pad(grad_logps, (0, 1))[rows.sequence]
    return gradient_coefficients(stats, grad, head)


def ratio_epilogue(
    stats: Statistics,
    sequence: Tensor,  # (n,) sequence of each row, relative to the first of the chunk
    starts: Tensor,  # (B+1,) first row of each sequence, relative to the first of the chunk
    ratio: RatioLoss,  # for the sequences of the chunk
    head: Head,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)) of a chunk: sequence sums, loss, coefficients."""
    logps = sequence_sums(stats.logp, sequence, starts)
    losses, grad = ratio.value_and_grad(logps)
    row_coef, target_coef = gradient_coefficients(stats, F.pad(grad, (0, 1))[sequence], head)
    return logps, losses, row_coef, target_coef


def scale_gradient(
    grad: Tensor, unit: Tensor | None, upstream: Tensor, dtype: torch.dtype, in_place: bool = False
) -> Tensor:
    """grad * unit (a factor per row, or None) * upstream (0-d) in float32, rounded once to `dtype`.

    On a GPU the operands and the result are cast inside the multiplication. A CPU makes float32 copies, so there it
    processes SCALED_ROWS rows at a time.
    """
    factor = upstream.float() if unit is None else upstream.float() * unit
    # with as many dimensions as grad: with a 0-d factor, type promotion would compute in the dtype of grad
    factor = factor.reshape(-1, *[1] * (grad.dim() - 1))
    out = grad if in_place and grad.dtype == dtype else torch.empty(grad.shape, dtype=dtype, device=grad.device)
    step = max(1, grad.shape[0]) if grad.is_cuda else SCALED_ROWS
    for i in range(0, grad.shape[0], step):
        rows = slice(i, i + step)
        torch.mul(grad[rows], factor if unit is None else factor[rows], out=out[rows])
    return out
