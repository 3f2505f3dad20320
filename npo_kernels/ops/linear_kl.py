"""npo_kernels::linear_kl_loss and ::linear_kl: KL of a model and a reference, as a scalar and per position.

The scalar computes its gradients in the forward, the vector in its backward (`core.linear_kl` counts the products).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import KLCall
from npo_kernels.core.gradients import Gradients
from npo_kernels.core.layout import OTHER_RANK, PADDING_ROW, compact
from npo_kernels.core.linear_kl import Pair
from npo_kernels.core.softmax_stats import Lowered, Normalizers
from npo_kernels.core.task import Needs, Task
from npo_kernels.core.value_checks import check_kl_labels
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
    """The counted positions of both models, compacted. The rows have no target terms in the gradients.

    `compact` expects labels, so counted positions get label 0 of a vocabulary of size 1 and the others ignore_index.
    """
    if call.labels is not None:
        check_kl_labels(call.labels, call.counted, call.head.weight.shape[0])
    ends = torch.arange(2, device=call.hidden.device) * call.hidden.shape[0]  # no copy from the host, which would sync
    rows = compact(torch.where(call.counted, 0, PADDING_ROW), ends, 1, PADDING_ROW, num_rows=None)
    rows = replace(rows, target=torch.full_like(rows.target, OTHER_RANK))
    head, ref_head = call.head.with_finite_bias(), call.ref_head.with_finite_bias()
    task = Task(call.hidden, head, rows, needs, backend_of(call.execution.impl), None, upstream_later)
    lowered = None if call.labels is None else Lowered(call.labels[rows.index], call.target_shift)
    return Pair(task, task.gather(), call.ref_hidden[rows.index], ref_head, lowered, call.reverse)


# ---------------------------------------------------------------------------------------------------------------------
# The weighted sum, with its gradients computed in the forward
# ---------------------------------------------------------------------------------------------------------------------


class KLLossCall(NamedTuple):
    """Arguments of `linear_kl_loss`."""

    call: KLCall
    scale: Tensor  # () factor of the sum


class KLLossResults(NamedTuple):
    loss: Tensor  # () scale * sum of KL over the counted positions
    kept: Kept


@operator("linear_kl_loss")
def linear_kl_loss(arguments: KLLossCall) -> KLLossResults:
    """The scaled sum of KL over the counted positions, and its gradients if needed."""
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
    call = arguments.call
    return SavedGradients(results.kept, call.execution.needs, call.hidden.dtype, call.execution.impl)


def _backward_loss(saved: SavedGradients, upstream: KLLossResults) -> tuple[Tensor | None, ...]:
    return saved.times(upstream.loss)


linear_kl_loss.register_backward(_save_loss, _backward_loss, of=("call.hidden", "call.head.weight", "call.head.bias"))


# ---------------------------------------------------------------------------------------------------------------------
# KL per position, with a backward for any upstream gradient
# ---------------------------------------------------------------------------------------------------------------------


class KLResults(NamedTuple):
    kl: Tensor  # (T,) 0 outside the mask
    statistics: Tensor  # (5, T) for the backward: `Normalizers` and a copy of kl, which the caller cannot modify


@operator("linear_kl")
def linear_kl(call: KLCall) -> KLResults:
    """KL per position; its gradients are computed in the backward."""
    pair = pair_of(call, call.execution.needs)
    pair.plan(call.execution.workspace_bytes)  # raises here if the workspace is too small for the backward
    normalizers = pair.normalizers()
    kl = pair.values(normalizers)
    return KLResults(pair.scatter(kl), pair.scatter(torch.stack((*vars(normalizers).values(), kl))))


@linear_kl.register_fake
def _(call: KLCall) -> KLResults:
    total = call.hidden.shape[0]
    return KLResults(*(call.hidden.new_empty(shape, dtype=torch.float32) for shape in ((total,), (5, total))))


class SavedKL(NamedTuple):
    """State saved by autograd between `linear_kl` and its backward."""

    call: KLCall
    statistics: Tensor  # (5, T)


class UpstreamKL(NamedTuple):
    """Arguments of `linear_kl_backward`."""

    grad: Tensor  # (T,)
    saved: SavedKL


@operator("linear_kl_backward")
def linear_kl_backward(upstream: UpstreamKL) -> GradientTensors:
    """The gradients of `linear_kl` for an upstream gradient per position."""
    call = upstream.saved.call
    pair = pair_of(call, call.execution.needs)
    index = pair.task.rows.index
    *normalizers, kl = upstream.saved.statistics.index_select(1, index)
    plan = pair.plan(call.execution.workspace_bytes)
    _, grads = pair.sweep(Normalizers(*normalizers), upstream.grad[index], plan, kl)
    return all_tensors(grads, call.hidden, call.head)


@linear_kl_backward.register_fake
def _(upstream: UpstreamKL) -> GradientTensors:
    call = upstream.saved.call
    return fake_gradients(call.hidden, call.head, call.execution.needs)


linear_kl_backward.refuse_second_derivative()


def _save(call: KLCall, results: KLResults) -> SavedKL:
    return SavedKL(call, results.statistics)


def _backward(saved: SavedKL, upstream: KLResults) -> tuple[Tensor | None, ...]:
    return linear_kl_backward(UpstreamKL(upstream.kl, saved)).wanted(saved.call.execution.needs)


linear_kl.register_backward(_save, _backward, of=("hidden", "head.weight", "head.bias"))
