"""npo_kernels::token_logps: log-probabilities, with a backward for any upstream gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import Call, Execution
from npo_kernels.core import execute
from npo_kernels.core.layout import DEAD_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics, gradient_coefficients
from npo_kernels.core.task import Task
from npo_kernels.ops.gradients import GradientTensors, all_tensors, fake_gradients
from npo_kernels.ops.schema import operator
from npo_kernels.ops.task import task_of


class SavedRows(NamedTuple):
    """What the backward needs of the N scored rows."""

    positions: Tensor  # (N,)
    target: Tensor  # (N,)
    sequence: Tensor  # (N,)
    starts: Tensor  # (B+1,)
    statistics: Tensor  # (5, N): `Statistics` in one tensor
    product: Tensor  # (N, H) the expectation of the frozen-head mode, (0, H) in the others


class TokenLogps(NamedTuple):
    """Results of `token_logps`."""

    tokens: Tensor  # (T,)
    logps: Tensor  # (B,)
    saved: SavedRows


@operator("token_logps")
def token_logps(call: Call) -> TokenLogps:
    task = task_of(call)
    rows, plan = task.rows, task.plan(call.execution.workspace_bytes, gradient_in_forward=False)
    x = task.gather()
    if plan.mode == "frozen":
        stats, product = execute.expectation(task, plan, x)
    else:
        stats = execute.log_probabilities(task, x)
        product = x.new_empty(0, x.shape[1], dtype=torch.float32)
    total = call.hidden.shape[0]
    tokens = torch.zeros(total + 1, dtype=torch.float32, device=x.device)
    tokens[torch.where(rows.target != DEAD_ROW, rows.index, total)] = stats.logp  # filling rows write past the end
    logps = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
    packed = torch.stack(tuple(vars(stats).values()))
    saved = SavedRows(rows.index, rows.target, rows.sequence, rows.starts, packed, product)
    return TokenLogps(tokens[:-1].clone(), logps, saved)


@token_logps.register_fake
def _(call: Call) -> TokenLogps:
    total, hidden_size = call.hidden.shape
    needs = call.execution.needs
    # the number of scored rows depends on data
    size = torch.library.get_ctx().new_dynamic_size() if call.num_rows is None else min(call.num_rows, total)

    def floats(*shape: int | torch.SymInt) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    def ints(*shape: int | torch.SymInt) -> Tensor:
        return call.targets.new_empty(shape)

    frozen = needs.hidden and not needs.head
    product = floats(size if frozen else 0, hidden_size)
    saved = SavedRows(ints(size), ints(size), ints(size), ints(call.num_sequences + 1), floats(5, size), product)
    return TokenLogps(floats(total), floats(call.num_sequences), saved)


class SavedCall(NamedTuple):
    """What autograd keeps between `token_logps` and its backward."""

    hidden: Tensor  # (T, H)
    head: Head
    saved: SavedRows
    execution: Execution


class Upstream(NamedTuple):
    """Arguments of `token_logps_backward`."""

    grad_tokens: Tensor  # (T,)
    grad_logps: Tensor  # (B,)
    call: SavedCall


@operator("token_logps_backward")
def token_logps_backward(upstream: Upstream) -> GradientTensors:
    call, saved = upstream.call, upstream.call.saved
    hidden, head, execution = call.hidden, call.head, call.execution
    rows = Rows(saved.positions, saved.target, saved.sequence, saved.starts, host_starts=None)
    task = Task(hidden, head, rows, execution.needs, backend_of(execution.impl), execution.shard)
    plan = task.plan(execution.workspace_bytes, gradient_in_forward=False)
    stats = Statistics(*saved.statistics)
    # a filling row reads the zero past the last sequence
    sequence_grads = torch.cat((upstream.grad_logps, upstream.grad_logps.new_zeros(1)))
    grad = torch.where(rows.target != DEAD_ROW, upstream.grad_tokens[rows.index], 0.0) + sequence_grads[rows.sequence]
    coefs = gradient_coefficients(stats, grad, head)
    if plan.mode == "frozen":
        grads = execute.expectation_backward(task, saved.product, coefs)
    else:
        grads = execute.recompute_backward(task, plan, task.gather(), stats, coefs)
    return all_tensors(grads, hidden, head)


@token_logps_backward.register_fake
def _(upstream: Upstream) -> GradientTensors:
    call = upstream.call
    return fake_gradients(call.hidden, call.head, call.execution.needs)


token_logps_backward.refuse_second_derivative()


def _save(call: Call, results: TokenLogps) -> SavedCall:
    return SavedCall(call.hidden, call.head, results.saved, call.execution)


def _backward(call: SavedCall, grads: TokenLogps) -> tuple[Tensor | None, ...]:
    tokens, logps, statistics = grads.tokens, grads.logps, call.saved.statistics
    if tokens is None:
        tokens = statistics.new_zeros(call.hidden.shape[0])
    if logps is None:
        logps = statistics.new_zeros(call.saved.starts.shape[0] - 1)
    return token_logps_backward(Upstream(tokens, logps, call)).wanted(call.execution.needs)


token_logps.register_backward(_save, _backward, of=("hidden", "head.weight", "head.bias"))
