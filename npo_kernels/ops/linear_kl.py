"""npo_kernels::linear_kl_loss and ::linear_kl: KL(reference || model), as a scalar and of each position.

The scalar forms its gradients in the forward (6 products in all), the vector in its backward (8).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import KLCall
from npo_kernels.core.gradients import Gradients
from npo_kernels.core.layout import DEAD_ROW, ELSEWHERE, compact
from npo_kernels.core.linear_kl import Pair
from npo_kernels.core.softmax_stats import Normalizers
from npo_kernels.core.task import Needs, Task
from npo_kernels.ops.gradients import (
    GradientTensors,
    Kept,
    SavedGradients,
    all_tensors,
    fake_gradients,
    fake_kept,
    kept,
)
from npo_kernels.ops.schema import operator


def pair_of(call: KLCall, needs: Needs, upstream_later: bool = False) -> Pair:
    """The counted positions, compacted; none has a label.

    `compact` takes labels, and here they say only what counts: 0 of a vocabulary of one, or the index that is ignored.
    """
    ends = torch.arange(2, device=call.hidden.device) * call.hidden.shape[0]  # a copy from the host would wait
    rows = compact(torch.where(call.counted, 0, DEAD_ROW), ends, 1, DEAD_ROW, num_rows=None)
    rows = replace(rows, target=torch.full_like(rows.target, ELSEWHERE))
    task = Task(call.hidden, call.head, rows, needs, backend_of(call.execution.impl), None, upstream_later)
    return Pair(task, task.gather(), call.ref_hidden[rows.index], call.ref_head)


# ---------------------------------------------------------------------------------------------------------------------
# A weighted sum, gradients formed in the forward
# ---------------------------------------------------------------------------------------------------------------------


class KLLossCall(NamedTuple):
    """Arguments of `linear_kl_loss`."""

    call: KLCall
    scale: Tensor  # (): of the sum


class KLLossResults(NamedTuple):
    loss: Tensor  # () scale * the sum over the counted positions
    kept: Kept


@operator("linear_kl_loss")
def linear_kl_loss(arguments: KLLossCall) -> KLLossResults:
    call, scale, needs = arguments.call, arguments.scale, arguments.call.execution.needs
    pair = pair_of(call, needs, upstream_later=True)
    plan, normalizers = pair.plan(call.execution.workspace_bytes), pair.normalizers()
    if needs.any:
        kl, grads = pair.sweep(normalizers, scale.expand(pair.x.shape[0]).contiguous(), plan)
    else:
        kl, grads = pair.values(normalizers), Gradients(None, None, None)
    return KLLossResults(kl.sum() * scale, kept(grads, call.hidden, call.head))


@linear_kl_loss.register_fake
def _(arguments: KLLossCall) -> KLLossResults:
    call = arguments.call
    loss = call.hidden.new_empty((), dtype=torch.float32)
    return KLLossResults(loss, fake_kept(call.hidden, call.head, call.execution.needs))


def _save_loss(arguments: KLLossCall, results: KLLossResults) -> SavedGradients:
    return SavedGradients(results.kept, arguments.call.execution.needs, arguments.call.hidden.dtype)


def _backward_loss(saved: SavedGradients, upstream: KLLossResults) -> tuple[Tensor | None, ...]:
    return saved.times(upstream.loss)


linear_kl_loss.register_backward(_save_loss, _backward_loss, of=("call.hidden", "call.head.weight", "call.head.bias"))


# ---------------------------------------------------------------------------------------------------------------------
# Each position, with a backward for any upstream gradient
# ---------------------------------------------------------------------------------------------------------------------


class KLResults(NamedTuple):
    kl: Tensor  # (T,) 0 outside the mask
    normalizers: Tensor  # (4, T): `Normalizers` of both models in one tensor


@operator("linear_kl")
def linear_kl(call: KLCall) -> KLResults:
    pair = pair_of(call, call.execution.needs)
    pair.plan(call.execution.workspace_bytes)  # what the backward cannot do is refused here
    normalizers = pair.normalizers()
    packed = torch.stack(tuple(vars(normalizers).values()))
    return KLResults(pair.scatter(pair.values(normalizers)), pair.scatter(packed))


@linear_kl.register_fake
def _(call: KLCall) -> KLResults:
    total = call.hidden.shape[0]
    return KLResults(*(call.hidden.new_empty(shape, dtype=torch.float32) for shape in ((total,), (4, total))))


class SavedKL(NamedTuple):
    """What autograd keeps between `linear_kl` and its backward."""

    call: KLCall
    normalizers: Tensor  # (4, T)


class UpstreamKL(NamedTuple):
    """Arguments of `linear_kl_backward`."""

    grad: Tensor  # (T,)
    saved: SavedKL


@operator("linear_kl_backward")
def linear_kl_backward(upstream: UpstreamKL) -> GradientTensors:
    call = upstream.saved.call
    pair = pair_of(call, call.execution.needs)
    index = pair.task.rows.index
    normalizers = Normalizers(*upstream.saved.normalizers.index_select(1, index))
    _, grads = pair.sweep(normalizers, upstream.grad[index], pair.plan(call.execution.workspace_bytes))
    return all_tensors(grads, call.hidden, call.head)


@linear_kl_backward.register_fake
def _(upstream: UpstreamKL) -> GradientTensors:
    call = upstream.saved.call
    return fake_gradients(call.hidden, call.head, call.execution.needs)


linear_kl_backward.refuse_second_derivative()


def _save(call: KLCall, results: KLResults) -> SavedKL:
    return SavedKL(call, results.normalizers)


def _backward(saved: SavedKL, upstream: KLResults) -> tuple[Tensor | None, ...]:
    return linear_kl_backward(UpstreamKL(upstream.kl, saved)).wanted(saved.call.execution.needs)


linear_kl.register_backward(_save, _backward, of=("hidden", "head.weight", "head.bias"))
