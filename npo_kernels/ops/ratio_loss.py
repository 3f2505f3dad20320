"""npo_kernels::ratio_loss: the reduced NPO and SimNPO losses, with their gradients computed in the forward."""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.call.call import Call
from npo_kernels.core import execute
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.softmax_stats import Statistics
from npo_kernels.core.value_checks import check_factors
from npo_kernels.ops.gradients import Kept, SavedGradients, fake_kept, kept
from npo_kernels.ops.schema import operator
from npo_kernels.ops.task import task_of


class RatioCall(NamedTuple):
    """Arguments of `ratio_loss`."""

    call: Call
    offset: Tensor  # (B,) float32: ref_logps, or -gamma
    normalizer: Tensor | None  # 0-d float32
    weights: Tensor | None  # (B,) float32
    beta: float
    length_normalized: bool
    reduction: str  # "mean" | "sum"


class RatioResults(NamedTuple):
    loss: Tensor  # ()
    logps: Tensor  # (B,)
    num_tokens: Tensor  # (B,) int64
    kept: Kept


@operator("ratio_loss")
def ratio_loss(arguments: RatioCall) -> RatioResults:
    call, offset, normalizer = arguments.call, arguments.offset, arguments.normalizer
    task = task_of(call, upstream_later=True)
    rows, num_tokens = task.rows, task.rows.num_tokens
    check_factors(offset, normalizer, arguments.weights, num_tokens)
    scale = task.backend.sequence_scale(num_tokens, arguments.reduction, normalizer, arguments.weights)
    ratio = RatioLoss(offset, scale, num_tokens, arguments.beta, arguments.length_normalized)
    values = []  # [logps, losses] of each chunk

    def weigh(stats: Statistics, chunk: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        starts, sequence = rows.starts[first : last + 1], rows.sequence[chunk]
        if first > 0:  # make them relative to the first sequence of the chunk
            starts, sequence = starts - starts[0], sequence - first
        *value, row_coef, target_coef = task.backend.ratio_epilogue(
            stats, sequence, starts, ratio.sequences(first, last), task.head
        )
        values.append(value)
        return row_coef, target_coef

    plan = task.plan(call.execution.workspace_bytes, gradient_in_forward=True)
    _, grads = execute.value_and_gradients(task, plan, weigh)
    logps, losses = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*values, strict=True))
    return RatioResults(losses.sum(), logps, num_tokens, kept(grads, call.hidden, call.head))


@ratio_loss.register_fake
def _(arguments: RatioCall) -> RatioResults:
    call, offset = arguments.call, arguments.offset
    num_tokens = call.labels.new_empty(offset.shape)
    gradients = fake_kept(call.hidden, call.head, call.execution.needs)
    return RatioResults(offset.new_empty(()), torch.empty_like(offset), num_tokens, gradients)


def _save(arguments: RatioCall, results: RatioResults) -> SavedGradients:
    call = arguments.call
    return SavedGradients(results.kept, call.execution.needs, call.hidden.dtype, call.execution.impl)


def _backward(saved: SavedGradients, upstream: RatioResults) -> tuple[Tensor | None, ...]:
    return saved.times(upstream.loss)


ratio_loss.register_backward(_save, _backward, of=("call.hidden", "call.head.weight", "call.head.bias"))
