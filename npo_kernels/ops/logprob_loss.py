"""`fused_logprob_loss`: the gradients of a user's loss of sequence log-probabilities, formed in the forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from npo_kernels.call.prepare import Inputs
from npo_kernels.core import execute as modes
from npo_kernels.core.execute import Statistics
from npo_kernels.core.softmax_stats import gradient_coefficients
from npo_kernels.logprobs import sequence_logps
from npo_kernels.ops import logprobs as ops
from npo_kernels.ops.schema import plan_of, task_of

LossFn = Callable[[Tensor, Tensor], Tensor]


def logprob_loss(call: Inputs, loss_fn: LossFn) -> Tensor:
    """loss_fn(logps, num_tokens) of a checked call.

    A Python function cannot be the argument of an operator, so under torch.compile, and where no gradient is wanted,
    the log-probabilities are an operator and `loss_fn` is traced after it.
    """
    if call.impl == "reference" or torch.compiler.is_compiling() or not any(call.needs):
        loss = loss_fn(*sequence_logps(call))
        _check_scalar(loss)
        return loss
    return _LogprobLoss.apply(call.positions.hidden, call.weight, call.bias, call, loss_fn)[0]


class _LogprobLoss(torch.autograd.Function):
    """(loss, its gradients as `ops.kept` has them): runs the loss in the forward, where the exponentials still exist.

    The gradients are outputs so that they hang on the graph: who differentiates them again gets an error, not zeros.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Inputs, loss_fn: LossFn):
        options = call.option_args[:-3]  # grad mode is off in here: what is needed the context knows
        task = task_of(
            hidden, weight, bias, *call.batch_args[3:], *options, *ctx.needs_input_grad[:3], upstream_later=True
        )
        rows, loss = task.rows, None

        def weigh(stats: Statistics, chunk: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
            nonlocal loss
            logps = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
            loss, grad = _value_and_grad(loss_fn, logps, rows.num_tokens)
            return gradient_coefficients(stats, torch.cat((grad, grad.new_zeros(1)))[rows.sequence], task.head)

        plan = plan_of(task, call.workspace_bytes, gradient_in_forward=True, separable=False)
        with ops.as_written(hidden):
            _, grads = modes.value_and_gradients(task, plan, weigh)
        ctx.set_materialize_grads(False)
        ctx.dtype = hidden.dtype
        saved = ops.kept(grads, hidden, weight)
        ctx.save_for_backward(*saved)
        return loss, *saved

    @staticmethod
    def backward(ctx, upstream: Tensor, *_):
        return *ops.kept_times(ctx.saved_tensors, upstream, ctx.needs_input_grad[:3], ctx.dtype), None, None


def _value_and_grad(loss_fn: LossFn, logps: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, dloss/dlogps), both detached."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        loss = loss_fn(leaf, num_tokens)
        _check_scalar(loss)
        _check_only_leaf(loss, leaf)
        if not loss.requires_grad:  # a loss that does not depend on logps, or depends on all of them ignored
            return loss.detach(), torch.zeros_like(logps)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return loss.detach(), torch.zeros_like(logps) if grad is None else grad


def _check_scalar(loss) -> None:
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
        if getattr(node, "variable", leaf) is not leaf:
            raise ValueError(
                f"loss_fn uses a tensor {tuple(node.variable.shape)} that requires grad besides logps: its gradient "
                "would be lost here; detach it, or apply the loss to the result of sequence_logprobs"
            )
        pending += [parent for parent, _ in node.next_functions]
