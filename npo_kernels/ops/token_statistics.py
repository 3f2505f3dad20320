"""npo_kernels::token_statistics: statistics of the next-token distributions, with a backward for any upstream gradient.

One product in the forward, three in the backward. One pass yields all statistics, so the operator always returns all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import Call, Execution
from npo_kernels.core.execute import gradients_of_slabs, target_logits
from npo_kernels.core.layout import OTHER_RANK, PADDING_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Plan
from npo_kernels.core.row_moments import NAMES, RowMoments, gradient_rows, join, statistics
from npo_kernels.core.task import Task
from npo_kernels.ops.gradients import GradientTensors, all_tensors, fake_gradients
from npo_kernels.ops.schema import operator
from npo_kernels.ops.task import task_of


def plan_of(task: Task, workspace_bytes: int | None) -> Plan:
    """Plan of the sweep that computes the gradients."""
    columns = task.head.weight.shape[0] if task.shard is None else max(task.shard.sizes)
    capped = task.head.softcap is not None
    scratch = task.backend.moment_scratch(task.hidden, task.rows.index.shape[0], columns, capped)
    return task.plan(workspace_bytes, gradient_in_forward=False, scratch=scratch)


class SavedMoments(NamedTuple):
    """State of the scored rows for the backward: `Rows` and `RowMoments` as tensors."""

    positions: Tensor  # (N,)
    target: Tensor  # (N,)
    sequence: Tensor  # (N,)
    starts: Tensor  # (B+1,)
    moments: Tensor  # (6, N) float32: `RowMoments` except argmax
    argmax: Tensor  # (N,) int64


class StatisticsResults(NamedTuple):
    values: Tensor  # (5, T) in the order of NAMES, 0 where nothing is scored
    saved: SavedMoments


@operator("token_statistics")
def token_statistics(call: Call) -> StatisticsResults:
    task = task_of(call)
    rows = task.rows
    plan_of(task, call.execution.workspace_bytes)  # raises here if the workspace is too small for the backward
    x = task.gather()
    whole = join(task.backend.row_moments(x, task.head, rows.target))
    vocab_size = task.head.weight.shape[0]
    if task.shard is not None:
        whole, vocab_size = join(task.shard.gather_moments(whole)), task.shard.vocab_size
    values, moments = statistics(whole, target_logits(task, x, rows.target), vocab_size)
    total = call.hidden.shape[0]
    scattered = values.new_zeros(len(NAMES), total + 1)
    scattered[:, torch.where(rows.target != PADDING_ROW, rows.index, total)] = values  # padding rows: the extra column
    packed = torch.stack(moments[:-1])
    saved = SavedMoments(rows.index, rows.target, rows.sequence, rows.starts, packed, moments.argmax)
    return StatisticsResults(scattered[:, :-1].clone(), saved)


@token_statistics.register_fake
def _(call: Call) -> StatisticsResults:
    total = call.hidden.shape[0]
    # the number of scored rows depends on the data
    size = torch.library.get_ctx().new_dynamic_size() if call.num_rows is None else min(call.num_rows, total)

    def floats(*shape: int | torch.SymInt) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    def ints(*shape: int | torch.SymInt) -> Tensor:
        return call.labels.new_empty(shape)

    starts = ints(call.num_sequences + 1)
    saved = SavedMoments(ints(size), ints(size), ints(size), starts, floats(6, size), ints(size))
    return StatisticsResults(floats(len(NAMES), total), saved)


class SavedStatistics(NamedTuple):
    """State saved by autograd between `token_statistics` and its backward."""

    hidden: Tensor  # (T, H)
    head: Head
    saved: SavedMoments
    execution: Execution


class UpstreamStatistics(NamedTuple):
    """Arguments of `token_statistics_backward`."""

    grad: Tensor  # (5, T)
    call: SavedStatistics


@operator("token_statistics_backward")
def token_statistics_backward(upstream: UpstreamStatistics) -> GradientTensors:
    call, saved = upstream.call, upstream.call.saved
    head, execution, shard = call.head, call.execution, call.execution.shard
    rows = Rows(saved.positions, saved.target, saved.sequence, saved.starts, saved.starts.diff(), host_starts=None)
    task = Task(call.hidden, head, rows, execution.needs, backend_of(execution.impl), shard)
    moments = RowMoments._make([*saved.moments, saved.argmax])
    vocab_size = head.weight.shape[0]
    if shard is not None:
        column = moments.argmax - sum(shard.sizes[: shard.rank])
        column = torch.where((column >= 0) & (column < vocab_size), column, OTHER_RANK)
        moments, vocab_size = moments._replace(argmax=column), shard.vocab_size
    grad = torch.where(rows.target != PADDING_ROW, upstream.grad[:, rows.index], 0.0)
    parts, coefs = gradient_rows(moments, grad, rows.target, head, vocab_size)
    x = task.gather()

    def slab_of(columns: tuple[int, int], out: Tensor) -> Tensor:
        return task.backend.moment_gradient(x, head, rows.target, parts, columns, out=out)

    plan = plan_of(task, execution.workspace_bytes)
    grads = gradients_of_slabs(task, plan, x, (coefs.row, coefs.target), slab_of, (coefs.peak, moments.argmax))
    return all_tensors(grads, call.hidden, head)


@token_statistics_backward.register_fake
def _(upstream: UpstreamStatistics) -> GradientTensors:
    call = upstream.call
    return fake_gradients(call.hidden, call.head, call.execution.needs)


token_statistics_backward.refuse_second_derivative()


def _save(call: Call, results: StatisticsResults) -> SavedStatistics:
    return SavedStatistics(call.hidden, call.head, results.saved, call.execution)


def _backward(call: SavedStatistics, upstream: StatisticsResults) -> tuple[Tensor | None, ...]:
    grads = token_statistics_backward(UpstreamStatistics(upstream.values, call))
    return grads.wanted(call.execution.needs)


token_statistics.register_backward(_save, _backward, of=("hidden", "head.weight", "head.bias"))
