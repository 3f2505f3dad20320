"""npo_kernels::token_logps: log-probabilities, with a backward for any upstream gradient."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.call.call import Call, Execution
from npo_kernels.core import execute
from npo_kernels.core.layout import PADDING_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics
from npo_kernels.core.task import Task
from npo_kernels.ops.gradients import GradientTensors, all_tensors, fake_gradients
from npo_kernels.ops.schema import operator
from npo_kernels.ops.task import task_of


class LogpsCall(NamedTuple):
    """Arguments of `token_logps`."""

    call: Call
    per_token: bool  # whether `TokenLogps.tokens` is wanted


class SavedRows(NamedTuple):
    """State of the N scored rows for the backward."""

    positions: Tensor  # (N,)
    target: Tensor  # (N,)
    sequence: Tensor  # (N,)
    starts: Tensor  # (B+1,)
    num_tokens: Tensor  # (B,)
    statistics: Statistics
    product: Tensor  # (N, H) E W of the frozen mode, (0, H) in the other modes


class TokenLogps(NamedTuple):
    """Results of `token_logps`."""

    tokens: Tensor  # (T,), or (0,) if not requested
    logps: Tensor  # (B,)
    saved: SavedRows


@operator("token_logps")
def token_logps(arguments: LogpsCall) -> TokenLogps:
    """Log-probabilities of sequences and (if requested) of tokens, with the state for their backward."""
    call = arguments.call
    task = task_of(call)
    rows, plan = task.rows, task.plan(call.execution.workspace_bytes, gradient_in_forward=False)
    x = task.gather()
    if plan.mode == "frozen":
        stats, product = execute.expectation(task, plan, x)
    else:
        stats = execute.log_probabilities(task, x)
        product = x.new_empty(0, x.shape[1], dtype=torch.float32)
    if stats.anchor is stats.target_logit:  # results of an operator must not share memory
        stats = replace(stats, anchor=stats.anchor.clone())
    tokens = stats.logp.new_empty(0)
    if arguments.per_token:
        tokens = stats.logp.new_zeros(call.hidden.shape[0])
        tokens.index_add_(0, rows.index, torch.where(rows.target != PADDING_ROW, stats.logp, 0.0))
    logps = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
    saved = SavedRows(rows.index, rows.target, rows.sequence, rows.starts, rows.num_tokens, stats, product)
    return TokenLogps(tokens, logps, saved)


@token_logps.register_fake
def _(arguments: LogpsCall) -> TokenLogps:
    call = arguments.call
    total, hidden_size = call.hidden.shape
    needs = call.execution.needs
    # the number of scored rows depends on the data
    size = torch.library.get_ctx().new_dynamic_size() if call.num_rows is None else min(call.num_rows, total)

    def floats(*shape: int | torch.SymInt) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    def ints(*shape: int | torch.SymInt) -> Tensor:
        return call.labels.new_empty(shape)

    frozen = needs.hidden and not needs.head
    product = floats(size if frozen else 0, hidden_size)
    stats = Statistics(*(floats(size) for _ in range(5)))
    sequences = ints(call.num_sequences + 1), ints(call.num_sequences)
    saved = SavedRows(ints(size), ints(size), ints(size), *sequences, stats, product)
    tokens = floats(total if arguments.per_token else 0)
    return TokenLogps(tokens, floats(call.num_sequences), saved)


class SavedCall(NamedTuple):
    """State saved by autograd between `token_logps` and its backward."""

    hidden: Tensor  # (T, H)
    head: Head
    saved: SavedRows
    execution: Execution


class Upstream(NamedTuple):
    """Arguments of `token_logps_backward`."""

    call: SavedCall
    grad_tokens: Tensor | None  # (T,)
    grad_logps: Tensor | None  # (B,)


@operator("token_logps_backward")
def token_logps_backward(upstream: Upstream) -> GradientTensors:
    call, saved = upstream.call, upstream.call.saved
    hidden, head, execution = call.hidden, call.head, call.execution
    rows = Rows(saved.positions, saved.target, saved.sequence, saved.starts, saved.num_tokens, host_starts=None)
    task = Task(hidden, head, rows, execution.needs, backend_of(execution.impl), execution.shard)
    plan = task.plan(execution.workspace_bytes, gradient_in_forward=False)
    coefs = task.backend.coefficients(saved.statistics, rows, upstream.grad_tokens, upstream.grad_logps, head)
    if plan.mode == "frozen":
        grads = execute.expectation_backward(task, saved.product, coefs)
    else:
        grads = execute.recompute_backward(task, plan, task.gather(), saved.statistics, coefs)
    return all_tensors(grads, hidden, head)


@token_logps_backward.register_fake
def _(upstream: Upstream) -> GradientTensors:
    call = upstream.call
    return fake_gradients(call.hidden, call.head, call.execution.needs)


token_logps_backward.refuse_second_derivative()


def _save(arguments: LogpsCall, results: TokenLogps) -> SavedCall:
    return SavedCall(arguments.call.hidden, arguments.call.head, results.saved, arguments.call.execution)


def _backward(call: SavedCall, grads: TokenLogps) -> tuple[Tensor | None, ...]:
    tokens: Tensor | None = grads.tokens
    if tokens is not None and not tokens.shape[0]:  # the tokens were not requested
        tokens = None
    upstream = Upstream(call, tokens, grads.logps)
    return token_logps_backward(upstream).wanted(call.execution.needs)


token_logps.register_backward(_save, _backward, of=("call.hidden", "call.head.weight", "call.head.bias"))
