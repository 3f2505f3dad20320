"""A loss function of the caller, evaluated in the forward so that the gradients can be computed there.

This is a torch.autograd.Function and not a custom operator, since operators cannot take a Python function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.call.call import Call
from npo_kernels.core import execute
from npo_kernels.core.layout import Rows
from npo_kernels.core.softmax_stats import Statistics, gradient_coefficients
from npo_kernels.core.value_checks import check_exact_rows
from npo_kernels.ops.gradients import GradientTensors, Kept, SavedGradients, kept
from npo_kernels.ops.schema import without_autocast
from npo_kernels.ops.task import task_of


@dataclass(frozen=True)
class ScoredTokens:
    """The input of a loss function: the log-probabilities of the scored tokens, and their sequences."""

    token_logps: Tensor  # (N,) float32
    sums: Tensor  # (B,) their sums per sequence, computed by the backend
    rows: Rows

    @property
    def sequence(self) -> Tensor:
        """(N,) int64. Padding rows, which exist only if the caller passed num_rows, get the last sequence."""
        sequence = self.rows.sequence
        return sequence if self.rows.host_starts is not None else sequence.clamp(max=self.sums.shape[0] - 1)

    @property
    def num_tokens(self) -> Tensor:
        """(B,) int64."""
        return self.rows.num_tokens

    @property
    def logps(self) -> Tensor:
        """(B,) the values of `sums`, differentiable with respect to `token_logps`."""
        logps: Tensor = SequenceSums.apply(self.token_logps, self.sums, self.rows.sequence)  # type: ignore[no-untyped-call]
        return logps


LossOfTokens = Callable[[ScoredTokens], Tensor]


def of_sequences(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> LossOfTokens:
    """Adapt loss_fn(logps (B,), num_tokens (B,))."""
    return lambda scored: loss_fn(scored.logps, scored.num_tokens)


def of_tokens(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossOfTokens:
    """Adapt loss_fn(token_logps (N,), sequence (N,), num_tokens (B,)) for exactly the N scored tokens."""

    def loss(scored: ScoredTokens) -> Tensor:
        rows = scored.rows
        token_logps = scored.token_logps
        if rows.host_starts is None:  # the caller passed num_rows, which must be exact
            check_exact_rows(rows.starts[-1], rows.index.shape[0])
            token_logps = token_logps * exact(rows.starts, rows.index.shape[0])
        return loss_fn(token_logps, scored.sequence, scored.num_tokens)

    return loss


def exact(starts: Tensor, num_rows: int) -> Tensor:
    """1 if the number of scored tokens equals num_rows, else NaN: a factor that makes loss and gradients NaN."""
    return torch.where(starts[-1] == num_rows, 1.0, torch.nan)


class TokenLossResults(NamedTuple):
    loss: Tensor  # ()
    token_logps: Tensor  # (N,)
    sequence: Tensor  # (N,) int64
    logps: Tensor  # (B,)
    num_tokens: Tensor  # (B,) int64


def token_loss(call: Call, loss: LossOfTokens) -> TokenLossResults:
    """Evaluate `loss` for a checked call with gradients. All results but the loss are detached."""
    inputs = call.hidden, call.head.weight, call.head.bias
    results = TokenLoss.apply(*inputs, call, loss)  # type: ignore[no-untyped-call]
    return TokenLossResults(*results[: len(TokenLossResults._fields)])


class TokenLoss(torch.autograd.Function):
    """Evaluates the loss in the forward, while the exponentials exist. Returns (*`TokenLossResults`, *`Kept`).

    hidden, weight and bias are those of `call`; they are passed separately because autograd tracks arguments only. The
    gradients are outputs so that they are part of the graph: a second derivative then raises instead of being zero.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, loss_of: LossOfTokens
    ) -> tuple[Tensor, ...]:
        results = None

        def weigh(stats: Statistics, chunk: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
            nonlocal results
            rows = task.rows
            sums = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
            scored = ScoredTokens(stats.logp.detach().requires_grad_(), sums, rows)
            loss, grad = _value_and_grad(loss_of, scored)
            results = TokenLossResults(loss, stats.logp, scored.sequence, sums, rows.num_tokens)
            return gradient_coefficients(stats, grad, task.head)

        with without_autocast(hidden):
            task = task_of(call, upstream_later=True)
            # not separable: a loss function may combine sequences, so it gets all of them at once
            plan = task.plan(call.execution.workspace_bytes, gradient_in_forward=True, separable=False)
            _, grads = execute.value_and_gradients(task, plan, weigh)
        ctx.set_materialize_grads(False)
        ctx.rest = call.execution.needs, hidden.dtype, call.execution.impl
        formed = kept(grads, hidden, call.head)
        saved = formed.grads.hidden, formed.grads.weight, formed.grads.bias, formed.unit
        ctx.save_for_backward(*saved)
        assert results is not None  # a plan has at least one chunk
        ctx.mark_non_differentiable(*results[1:])
        return *results, *saved

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *grads, unit = ctx.saved_tensors
        saved = SavedGradients(Kept(GradientTensors(*grads), unit), *ctx.rest)
        return *saved.times(upstream), None, None


class SequenceSums(torch.autograd.Function):
    """The sums (B,) of token_logps (N,) per sequence, with the values that the backend has already computed."""

    @staticmethod
    def forward(ctx: Any, token_logps: Tensor, sums: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(sequence)
        return sums.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (sequence,) = ctx.saved_tensors
        return F.pad(upstream, (0, 1))[sequence], None, None  # padding rows read the zero after the last sequence


def _value_and_grad(loss_of: LossOfTokens, scored: ScoredTokens) -> tuple[Tensor, Tensor]:
    """(loss, its gradient (N,)), both detached."""
    leaf = scored.token_logps
    with torch.enable_grad():
        loss = loss_of(scored)
        check_scalar(loss, leaf.device)
        _check_only_leaf(loss, leaf)
        if not loss.requires_grad:  # the loss does not depend on the log-probabilities
            return loss.detach(), torch.zeros_like(leaf)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(leaf) if grad is None else grad


def check_scalar(loss: Tensor, device: torch.device) -> None:
    """Check that the result of `loss_fn` is a 0-d floating-point tensor on `device`, the device of its arguments."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        received = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn: expected it to return a 0-d tensor, got {received}; reduce it with .mean() or .sum()"
        )
    if not loss.is_floating_point():
        raise ValueError(
            f"loss_fn: expected it to return a floating-point tensor, got {loss.dtype}, which carries no gradient to "
            "the log-probabilities; compute the loss in float32"
        )
    if loss.device != device:
        raise ValueError(
            f"loss_fn: expected it to return a tensor on {device}, as its arguments are, got {loss.device}"
        )


def _check_only_leaf(loss: Tensor, leaf: Tensor) -> None:
    """Refuse a loss that depends on another tensor that requires grad: that tensor's gradient would be lost."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable: Tensor = getattr(node, "variable", leaf)
        if variable is not leaf:
            raise ValueError(
                f"loss_fn uses a tensor {tuple(variable.shape)} that requires grad besides logps: its gradient "
                "would be lost here; detach it, or apply the loss to the result of sequence_logprobs or token_logprobs"
            )
        pending += [parent for parent, _ in node.next_functions]
