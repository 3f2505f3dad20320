"""The gradients of a user's loss of sequence log-probabilities, formed in the forward.

No operator: a Python function cannot be the argument of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npo_kernels.call.call import Call
from npo_kernels.core import execute
from npo_kernels.core.softmax_stats import Statistics, gradient_coefficients
from npo_kernels.ops.gradients import GradientTensors, Kept, SavedGradients, kept
from npo_kernels.ops.schema import as_written
from npo_kernels.ops.task import task_of

LossFn = Callable[[Tensor, Tensor], Tensor]


def logprob_loss(call: Call, loss_fn: LossFn) -> Tensor:
    """loss_fn(logps, num_tokens) of a checked call of which a gradient is wanted."""
    inputs = call.hidden, call.head.weight, call.head.bias
    loss: Tensor = LogprobLoss.apply(*inputs, call, loss_fn)[0]  # type: ignore[no-untyped-call]
    return loss


class LogprobLoss(torch.autograd.Function):
    """(loss, its gradients as `Kept`): runs the loss in the forward, where the exponentials still exist.

    hidden, weight and bias are those of the call; autograd sees arguments only.
    The gradients are outputs so that they hang on the graph: who differentiates them again gets an error, not zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, loss_fn: LossFn
    ) -> tuple[Tensor, ...]:
        task = task_of(call, upstream_later=True)
        rows, loss = task.rows, None

        def weigh(stats: Statistics, chunk: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
            nonlocal loss
            logps = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
            loss, grad = _value_and_grad(loss_fn, logps, rows.num_tokens)
            return gradient_coefficients(stats, torch.cat((grad, grad.new_zeros(1)))[rows.sequence], task.head)

        plan = task.plan(call.execution.workspace_bytes, gradient_in_forward=True, separable=False)
        with as_written(hidden):
            _, grads = execute.value_and_gradients(task, plan, weigh)
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.dtype = call.execution.needs, hidden.dtype
        formed = kept(grads, hidden, call.head)
        saved = formed.grads.hidden, formed.grads.weight, formed.grads.bias, formed.unit
        ctx.save_for_backward(*saved)
        assert loss is not None  # a plan has a chunk at least
        return loss, *saved

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *grads, unit = ctx.saved_tensors
        saved = SavedGradients(Kept(GradientTensors(*grads), unit), ctx.needs, ctx.dtype)
        return *saved.times(upstream), None, None


def _value_and_grad(loss_fn: LossFn, logps: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dlogps), both detached."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = loss_fn(leaf, num_tokens)
        check_scalar(loss)
        _check_only_leaf(loss, leaf)
        if not loss.requires_grad:  # a loss that does not depend on logps, or depends on all of them ignored
            return loss.detach(), torch.zeros_like(logps)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(logps) if grad is None else grad


def check_scalar(loss: Tensor) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        came = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected it to return a 0-d tensor, got {came}; reduce it with .mean() or .sum()")
    if not loss.is_floating_point():
        raise ValueError(
            f"loss_fn: expected it to return a floating-point tensor, got {loss.dtype}, which carries no gradient to "
            "the log-probabilities; compute the loss in float32"
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
                "would be lost here; detach it, or apply the loss to the result of sequence_logprobs"
            )
        pending += [parent for parent, _ in node.next_functions]
