"""The custom operators: what torch.compile, export and selective checkpointing see of this package.

    npo_kernels::token_logps           (hidden, head, targets) -> log-probabilities; differentiable, any loss outside
    npo_kernels::token_logps_backward
    npo_kernels::ratio_loss            (..., offset) -> NPO or SimNPO loss with its gradients formed in the forward
    npo_kernels::scale_gradient        those gradients times the upstream scalar

All are functional: no state, no mutation, no aliasing, plain tensors out (an unwanted gradient is an empty one). The
sizes that depend on data (the number of scored rows) are unbacked in the fakes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor

from npo_kernels.call.checks import check_factors
from npo_kernels.core import execute as modes
from npo_kernels.core.execute import Gradients, Statistics, Task
from npo_kernels.core.formulas import RatioLoss, reduce, sequence_scale
from npo_kernels.core.layout import DEAD_ROW, Rows
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import GRAD_SLICE
from npo_kernels.core.softmax_stats import gradient_coefficients
from npo_kernels.ops.schema import backend_of, plan_of, shard_of, task_of

SECOND_DERIVATIVE = (
    "npo_kernels has no second derivatives: the kernels form first gradients only. Use impl='reference' where "
    "create_graph=True is needed, or detach the loss from the part that is differentiated twice"
)


@contextmanager
def as_written(tensor: Tensor) -> Iterator[None]:
    """No autocast: it has done its work on the inputs, and here it would round the float32 sums. And the device of the
    tensor is the current one, on which Triton launches.
    """
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def runs_as_written(op):
    """An operator in that context, of its first tensor."""

    @wraps(op)
    def run(first: Tensor, *args):
        with as_written(first):
            return op(first, *args)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# token_logps: log-probabilities, with a backward for any upstream gradient
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("npo_kernels::token_logps", mutates_args=())
@runs_as_written
def token_logps(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (T,) int64
    offsets: Tensor,  # (B+1,) int64
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    num_rows: int | None,
    workspace_bytes: int,
    group: str | None,
    sizes: Sequence[int],
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> token_logps (T,), logps (B,), then what the backward needs: row index, target, sequence (N,), starts (B+1,),
    statistics (5, N), and the expectation (N, H) of the frozen-head mode."""
    task = task_of(
        hidden, weight, bias, targets, offsets, ignore_index, logit_scale, softcap, num_rows, workspace_bytes, group,
        sizes, impl, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    rows, plan = task.rows, plan_of(task, workspace_bytes, gradient_in_forward=False)
    x = task.gather()
    if plan.mode == "frozen":
        stats, product = modes.expectation(task, plan, x)
    else:
        stats = modes.log_probabilities(task, x)
        product = hidden.new_empty(0, hidden.shape[1], dtype=torch.float32)
    tokens = torch.zeros(hidden.shape[0] + 1, dtype=torch.float32, device=hidden.device)
    live = rows.target != DEAD_ROW  # filling rows write past the end
    tokens[torch.where(live, rows.index, hidden.shape[0])] = stats.logp
    logps = task.backend.sequence_sums(stats.logp, rows.sequence, rows.starts)
    packed = torch.stack(tuple(vars(stats).values()))
    return tokens[:-1].clone(), logps, rows.index, rows.target, rows.sequence, rows.starts, packed, product


@token_logps.register_fake
def _(hidden, weight, bias, targets, offsets, ignore_index, logit_scale, softcap, num_rows, workspace_bytes, group,
      sizes, impl, need_hidden, need_weight, need_bias):  # fmt: skip
    size = torch.library.get_ctx().new_dynamic_size() if num_rows is None else min(num_rows, hidden.shape[0])
    frozen = need_hidden and not need_weight and not need_bias
    ints = [targets.new_empty(size) for _ in range(3)]
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(offsets.shape[0] - 1, dtype=torch.float32),
        *ints,
        targets.new_empty(offsets.shape[0]),
        hidden.new_empty(5, size, dtype=torch.float32),
        hidden.new_empty(size if frozen else 0, hidden.shape[1], dtype=torch.float32),
    )


@torch.library.custom_op("npo_kernels::token_logps_backward", mutates_args=())
@runs_as_written
def token_logps_backward(
    grad_tokens: Tensor,  # (T,)
    grad_logps: Tensor,  # (B,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    target: Tensor,
    sequence: Tensor,
    starts: Tensor,
    statistics: Tensor,
    product: Tensor,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    group: str | None,
    sizes: Sequence[int],
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dHidden (T, H), dWeight (V, H), dBias (V,); empty where not needed."""
    head = Head(weight, bias, logit_scale, softcap)
    rows = Rows(index, target, sequence, starts, host_starts=None)
    task = Task(hidden, head, rows, need_hidden, need_weight, need_bias, backend_of(impl), shard_of(group, sizes))
    plan = plan_of(task, workspace_bytes, gradient_in_forward=False)
    stats = Statistics(*statistics)
    live = target != DEAD_ROW
    # a filling row reads the zero past the last sequence
    grad = torch.where(live, grad_tokens[index], 0.0) + torch.cat((grad_logps, grad_logps.new_zeros(1)))[sequence]
    coefs = gradient_coefficients(stats, grad, head)
    if plan.mode == "frozen":
        grads = modes.expectation_backward(task, product, coefs)
    else:
        grads = modes.recompute_backward(task, plan, task.gather(), stats, coefs)
    return all_tensors(grads, hidden, weight)


@token_logps_backward.register_fake
def _(grad_tokens, grad_logps, hidden, weight, bias, index, target, sequence, starts, statistics, product, logit_scale,
      softcap, workspace_bytes, group, sizes, impl, need_hidden, need_weight, need_bias):  # fmt: skip
    return fake_gradients(hidden, weight, need_hidden, need_weight, need_bias)


def all_tensors(grads: Gradients, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dHidden, dWeight, dBias), an empty tensor where one is not wanted: operators return tensors only."""
    empty = (hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0))
    found = (grads.hidden, grads.weight, grads.bias)
    return tuple(e if g is None else g for g, e in zip(found, empty, strict=True))


def kept(grads: Gradients, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dHidden, dWeight, dBias, unit of dWeight) until the upstream gradient is known; empty where not wanted.

    See `modes.Task.upstream_later`: float16 alone has units, and dHidden and dBias in float32.
    """
    unit = hidden.new_empty(0, dtype=torch.float32) if grads.unit is None else grads.unit
    return *all_tensors(grads, hidden, weight), unit


def fake_kept(hidden, weight, need_hidden, need_weight, need_bias) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kept` without values."""
    half = hidden.dtype == torch.float16
    wide = torch.float32 if half else hidden.dtype
    x, w, b = fake_gradients(hidden, weight, need_hidden, need_weight, need_bias)
    x, b = (t.to(wide) if need else t for t, need in ((x, need_hidden), (b, need_bias)))
    return x, w, b, hidden.new_empty(weight.shape[0] if half and need_weight else 0, dtype=torch.float32)


def fake_gradients(hidden, weight, need_hidden, need_weight, need_bias) -> tuple[Tensor, Tensor, Tensor]:
    """`all_tensors` without values: what the fakes of the operators return."""
    return (
        hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_bias else weight.new_empty(0),
    )


def _setup_token_logps(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (
        hidden,
        weight,
        bias,
        _,
        _,
        _,
        ctx.logit_scale,
        ctx.softcap,
        _,
        *ctx.options,
        need_hidden,
        need_weight,
        need_bias,
    ) = inputs
    ctx.needs = (need_hidden, need_weight, need_bias)
    ctx.save_for_backward(hidden, weight, bias, *output[2:])


def _backward_token_logps(ctx, grad_tokens, grad_logps, *_):
    hidden, weight, bias, index, target, sequence, starts, statistics, product = ctx.saved_tensors
    if grad_tokens is None:
        grad_tokens = statistics.new_zeros(hidden.shape[0])
    if grad_logps is None:
        grad_logps = statistics.new_zeros(starts.shape[0] - 1)
    grads = token_logps_backward(
        grad_tokens, grad_logps, hidden, weight, bias, index, target, sequence, starts, statistics, product,
        ctx.logit_scale, ctx.softcap, *ctx.options, *ctx.needs,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(grads, ctx.needs, strict=True)), *[None] * 13


token_logps.register_autograd(_backward_token_logps, setup_context=_setup_token_logps)


# ---------------------------------------------------------------------------------------------------------------------
# ratio_loss: NPO and SimNPO with gradients formed in the forward
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("npo_kernels::ratio_loss", mutates_args=())
@runs_as_written
def ratio_loss(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (T,) int64
    offsets: Tensor,  # (B+1,) int64
    offset: Tensor,  # (B,) float32: ref_logps, or -gamma
    normalizer: Tensor | None,  # 0-d
    beta: float,
    length_normalized: bool,
    reduction: str,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    num_rows: int | None,
    workspace_bytes: int,
    group: str | None,
    sizes: Sequence[int],
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), logps (B,), num_tokens (B,) of a "mean" or "sum" loss, and its gradients as `kept` has them."""
    task = task_of(
        hidden, weight, bias, targets, offsets, ignore_index, logit_scale, softcap, num_rows, workspace_bytes, group,
        sizes, impl, need_hidden, need_weight, need_bias, upstream_later=True,
    )  # fmt: skip
    rows, num_tokens = task.rows, task.rows.num_tokens
    check_factors(offset, normalizer, num_tokens)
    scale = sequence_scale(num_tokens, reduction, normalizer)
    ratio = RatioLoss(offset, scale, num_tokens, beta, length_normalized)
    logps, losses = torch.empty_like(offset), torch.empty_like(offset)

    def weigh(stats: Statistics, chunk: slice, first: int, last: int) -> tuple[Tensor, Tensor]:
        starts = rows.starts[first : last + 1] - rows.starts[first]
        part = task.backend.ratio_epilogue(
            stats, rows.sequence[chunk] - first, starts, ratio.sequences(first, last), task.head
        )
        logps[first:last], losses[first:last], row_coef, target_coef = part
        return row_coef, target_coef

    plan = plan_of(task, workspace_bytes, gradient_in_forward=True)
    _, grads = modes.value_and_gradients(task, plan, weigh)
    return reduce(scale, losses).sum(), logps, num_tokens, *kept(grads, hidden, weight)


@ratio_loss.register_fake
def _(hidden, weight, bias, targets, offsets, offset, normalizer, beta, length_normalized, reduction, ignore_index,
      logit_scale, softcap, num_rows, workspace_bytes, group, sizes, impl, need_hidden, need_weight,
      need_bias):  # fmt: skip
    gradients = fake_kept(hidden, weight, need_hidden, need_weight, need_bias)
    return offset.new_empty(()), torch.empty_like(offset), targets.new_empty(offset.shape), *gradients


def setup_kept(ctx, inputs, output):
    """Of every operator whose last inputs are `needs` and whose last outputs are `kept` gradients."""
    ctx.set_materialize_grads(False)  # no zeros of the size of dWeight for outputs nobody differentiates
    ctx.needs, ctx.dtype, ctx.num_inputs = inputs[-3:], inputs[0].dtype, len(inputs)
    ctx.save_for_backward(*output[-4:])


def scale_kept(ctx, upstream, *_):
    """The gradients of all inputs of such an operator."""
    grads = kept_times(ctx.saved_tensors, upstream, ctx.needs, ctx.dtype)
    return *grads, *[None] * (ctx.num_inputs - len(grads))


def kept_times(saved: Sequence[Tensor], upstream: Tensor, needs: Sequence[bool], dtype: torch.dtype) -> list:
    """[dHidden, dWeight, dBias] in the dtype of the inputs from what `kept` returned; None where not needed."""
    *grads, unit = saved
    units = (None, unit if unit.numel() else None, None)
    return [
        scale_gradient(grad, u, upstream, dtype) if need else None
        for grad, u, need in zip(grads, units, needs, strict=True)
    ]


ratio_loss.register_autograd(scale_kept, setup_context=setup_kept)


@torch.library.custom_op("npo_kernels::scale_gradient", mutates_args=())
@runs_as_written
def scale_gradient(grad: Tensor, unit: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * unit (a factor of each row, or none) * upstream (0-d) in float32, rounded once to `dtype`.

    Never in place: the graph may be kept. A GPU casts operands and result inside the product; a CPU copies them in
    float32, so there it is done a slice of rows at a time.
    """
    factor = upstream if unit is None else upstream * unit
    # as many dimensions as grad has: the dtype of a 0-d factor would yield to that of grad
    factor = factor.reshape(-1, *[1] * (grad.dim() - 1))
    out = torch.empty_like(grad, dtype=dtype)
    step = max(1, grad.shape[0]) if grad.is_cuda else GRAD_SLICE
    for i in range(0, grad.shape[0], step):
        rows = slice(i, i + step)
        torch.mul(grad[rows], factor if unit is None else factor[rows], out=out[rows])
    return out


@scale_gradient.register_fake
def _(grad, unit, upstream, dtype):
    return torch.empty_like(grad, dtype=dtype)


def no_second_derivative(ctx, *_):
    """The backward of operators that form gradients: refuses, instead of giving zeros."""
    raise NotImplementedError(SECOND_DERIVATIVE)


for op in (token_logps_backward, scale_gradient):
    op.register_autograd(no_second_derivative)
