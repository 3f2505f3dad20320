"""The gradients of a user's loss of log-probabilities, formed in the forward.

No operator: a Python function cannot be the argument of one.
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
from npo_kernels.ops.schema import as_written
from npo_kernels.ops.task import task_of


@dataclass(frozen=True)
class ScoredTokens:
    """What a loss is given: the log-probabilities of the scored tokens, and where each belongs."""

    token_logps: Tensor  # (N,) float32
    sums: Tensor  # (B,) their sums, as the backend forms them
    rows: Rows

    @property
    def sequence(self) -> Tensor:
        """(N,) int64; of filling rows, which there are only where the caller passed num_rows, that of the last."""
        sequence = self.rows.sequence
        return sequence if self.rows.host_starts is not None else sequence.clamp(max=self.sums.shape[0] - 1)

    @property
    def num_tokens(self) -> Tensor:
        """(B,) int64."""
        return self.rows.num_tokens

    @property
    def logps(self) -> Tensor:
        """(B,) `sums` as a differentiable function of `token_logps`."""
        logps: Tensor = SequenceSums.apply(self.token_logps, self.sums, self.rows.sequence)  # type: ignore[no-untyped-call]
        return logps


LossOfTokens = Callable[[ScoredTokens], Tensor]


def of_sequences(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> LossOfTokens:
    """loss_fn(logps (B,), num_tokens (B,))."""
    return lambda scored: loss_fn(scored.logps, scored.num_tokens)


def of_tokens(loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossOfTokens:
    """loss_fn(token_logps (N,), sequence (N,), num_tokens (B,)), where N is the number of scored tokens exactly."""

    def loss(scored: ScoredTokens) -> Tensor:
        rows = scored.rows
        token_logps = scored.token_logps
        if rows.host_starts is None:  # the caller passed num_rows, which has to be right
            check_exact_rows(rows.starts[-1], rows.index.shape[0])
            token_logps = token_logps * exact(rows.starts, rows.index.shape[0])
        return loss_fn(token_logps, scored.sequence, scored.num_tokens)

    return loss


def exact(starts: Tensor, num_rows: int) -> Tensor:
    """1 where there are as many scored tokens as rows, else NaN: of the loss and of its gradients."""
    return torch.where(starts[-1] == num_rows, 1.0, torch.nan)


class TokenLossResults(NamedTuple):
    loss: Tensor  # ()
    token_logps: Tensor  # (N,)
    sequence: Tensor  # (N,) int64
    logps: Tensor  # (B,)
    num_tokens: Tensor  # (B,) int64


def token_loss(call: Call, loss: LossOfTokens) -> TokenLossResults:
    """`loss` of a checked call of which a gradient is wanted; all but the loss is detached."""
    inputs = call.hidden, call.head.weight, call.head.bias
    results = TokenLoss.apply(*inputs, call, loss)  # type: ignore[no-untyped-call]
    return TokenLossResults(*results[: len(TokenLossResults._fields)])


class TokenLoss(torch.autograd.Function):
    """(`TokenLossResults`, the gradients as `Kept`): runs the loss in the forward, where the exponentials still exist.

    hidden, weight and bias are those of the call; autograd sees arguments only.
    The gradients are outputs so that they hang on the graph: who differentiates them again gets an error, not zeros.
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

        with as_written(hidden):
            task = task_of(call, upstream_later=True)
            # not separable: a loss may mix sequences, so it sees all of them at once
            plan = task.plan(call.execution.workspace_bytes, gradient_in_forward=True, separable=False)
            _, grads = execute.value_and_gradients(task, plan, weigh)
        ctx.set_materialize_grads(False)
        ctx.rest = call.execution.needs, hidden.dtype, call.execution.impl
        formed = kept(grads, hidden, call.head)
        saved = formed.grads.hidden, formed.grads.weight, formed.grads.bias, formed.unit
        ctx.save_for_backward(*saved)
        assert results is not None  # a plan has a chunk at least
        ctx.mark_non_differentiable(*results[1:])
        return *results, *saved

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *grads, unit = ctx.saved_tensors
        saved = SavedGradients(Kept(GradientTensors(*grads), unit), *ctx.rest)
        return *saved.times(upstream), None, None


class SequenceSums(torch.autograd.Function):
    """The sums (B,) of token_logps (N,) by sequence, which the backend has formed already."""

    @staticmethod
    def forward(ctx: Any, token_logps: Tensor, sums: Tensor, sequence: Tensor) -> Tensor:
        ctx.save_for_backward(sequence)
        return sums.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (sequence,) = ctx.saved_tensors
        return F.pad(upstream, (0, 1))[sequence], None, None  # a filling row reads the zero past the last sequence


def _value_and_grad(loss_of: LossOfTokens, scored: ScoredTokens) -> tuple[Tensor, Tensor]:
    """(loss, its gradient (N,)), both detached."""
    leaf = scored.token_logps
    with torch.enable_grad():
        loss = loss_of(scored)
        check_scalar(loss, leaf.device)
        _check_only_leaf(loss, leaf)
        if not loss.requires_grad:  # a loss that does not depend on them, or depends on all of them ignored
            return loss.detach(), torch.zeros_like(leaf)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(leaf) if grad is None else grad


def check_scalar(loss: Tensor, device: torch.device) -> None:
    """A result of `loss_fn` from which a gradient can reach log-probabilities on `device`."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected it to return a 0-d tensor, got {came}; reduce it with .mean() or .sum()")
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
    """Refuse a loss whose graph reaches another tensor that requires grad: its gradient would be lost."""
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
