"""`fused_linear_kl`: KL(reference || model) of two heads on two hidden states, neither set of logits kept.

    KL_i = sum_v q_iv (log q_iv - log p_iv),   p = softmax(z), q = softmax(z_ref)
    dKL_i / dz_iv = p_iv - q_iv

The normalizers of both softmaxes come first (one product each); a second sweep over the vocabulary, a slice at a time,
forms the sum and p - q from the difference of the log-probabilities, which keeps their relative precision where the
models agree and at logits of any size (`csrc_triton.linear_kl`), and takes the gradients there. Positions outside the
mask cost nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.call.arguments import checked
from npo_kernels.call.checks import check_kl
from npo_kernels.call.prepare import autocast_inputs, resolve_impl
from npo_kernels.core.execute import Gradients, HeadGradients, Task, finish_hidden_grad
from npo_kernels.core.layout import DEAD_ROW, ELSEWHERE, Rows, compact
from npo_kernels.core.lm_head import Head
from npo_kernels.core.matmul import matmul
from npo_kernels.core.plan import workspace_bytes
from npo_kernels.core.softmax_stats import Normalizers, merge_sums
from npo_kernels.ops.logprobs import (
    all_tensors,
    fake_gradients,
    fake_kept,
    kept,
    no_second_derivative,
    runs_as_written,
    scale_kept,
    setup_kept,
)
from npo_kernels.ops.schema import backend_of, plan_of


@checked
def fused_linear_kl(
    hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., H_ref)
    ref_lm_head_weight: Tensor,  # (V, H_ref)
    *,
    mask: Tensor | None = None,  # (...)
    reduction: str = "mean",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """KL(reference || model) of the next-token distributions, the retain term of NPO+KL (arXiv 2404.05868, section 3).

    Replaces::

        logp = F.linear(hidden, lm_head_weight, bias).float().log_softmax(-1)
        ref_logp = F.linear(ref_hidden, ref_lm_head_weight, ref_bias).float().log_softmax(-1)
        kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
        loss = kl[mask].mean()

    Args:
        hidden, lm_head_weight, bias: the model's, float32, bfloat16 or float16.
        ref_hidden, ref_lm_head_weight, ref_bias: the reference's, no gradient; V must be the model's, H need not.
        mask: bool, the positions that count (labels != -100, say); None counts all.
        reduction: "mean" over the positions of the mask, "sum", or "none" -> (...) with 0 outside the mask.
        logit_scale, softcap: of both models, as in `sequence_logprobs`.
        impl: "triton", "torch" (bounded memory on any device), "reference" (keeps both logits), "auto" (Triton on a
            GPU, torch elsewhere). A name never falls back.
        workspace_mb: MiB for the slice of p - q held at a time and what goes with it.

    Returns:
        float32, in nats. An empty mask gives 0 with zero gradients. With "mean" and "sum" the gradients are formed in
        the forward (6 products in all), with "none" in the backward (8).

    Raises:
        ValueError, TypeError: bad input; the message says what came, what is expected and what to do.
        NotImplementedError: when the gradient is differentiated again.
    """
    device = hidden.device
    hidden, lm_head_weight, bias = autocast_inputs(hidden, lm_head_weight, bias)
    ref_hidden, ref_lm_head_weight, ref_bias = autocast_inputs(ref_hidden, ref_lm_head_weight, ref_bias)
    check_kl(hidden, lm_head_weight, bias, ref_hidden, ref_lm_head_weight, ref_bias, mask, impl)
    # the kernels take any row stride, but the elements of a bias side by side
    bias, ref_bias = (None if b is None else b.contiguous() for b in (bias, ref_bias))
    shape = hidden.shape[:-1]
    x, ref_x = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    counted = torch.ones(x.shape[0], dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
    ref_head = (ref_lm_head_weight.detach(), None if ref_bias is None else ref_bias.detach())
    numbers = (float(logit_scale), None if softcap is None else float(softcap))

    if impl == "reference":
        # before the products: 0 times a non-finite hidden state outside the mask would be a NaN of all gradients
        x, ref_x = (torch.where(counted.unsqueeze(-1), t, 0.0) for t in (x, ref_x))
        kl = reference_kl(x, Head(lm_head_weight, bias, *numbers), ref_x, Head(*ref_head, *numbers))
        kl = torch.where(counted, kl, 0.0)
        if reduction == "none":
            return kl.reshape(shape)
        return kl.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)

    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, lm_head_weight, bias))
    sides = (x, lm_head_weight, bias, ref_x, *ref_head, counted)
    options = (*numbers, workspace_bytes(workspace_mb, device), resolve_impl(impl, device), *needs)
    if reduction == "none":
        return linear_kl(*sides, *options)[0].reshape(shape)
    scale = 1.0 / counted.sum().clamp(min=1) if reduction == "mean" else torch.ones((), device=device)
    return linear_kl_loss(*sides, scale, *options)[0]


def reference_kl(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Tensor:
    """The oracle: (N,) KL(ref || model) in plain PyTorch, any dtype, differentiable to any order."""
    logp, ref_logp = (torch.log_softmax(_all_logits(*side), dim=-1) for side in ((x, head), (ref_x, ref_head)))
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def _all_logits(x: Tensor, head: Head) -> Tensor:
    z = torch.nn.functional.linear(x, head.weight, head.bias)
    z = head.logit_scale * (z if z.dtype == torch.float64 else z.float())
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep over the vocabulary
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The counted positions of both models."""

    task: Task  # of the model
    x: Tensor  # (N, H)
    ref_x: Tensor  # (N, H_ref)
    ref_head: Head

    def normalizers(self) -> Normalizers:
        """Of both softmaxes. Two products."""
        backend = self.task.backend
        model = merge_sums(*backend.softmax_sums(self.x, self.task.head, self.ref_x))
        return Normalizers(*model, *merge_sums(*backend.softmax_sums(self.ref_x, self.ref_head, self.x)))

    def sweep(self, normalizers: Normalizers, row_weight: Tensor | None, limit: int) -> tuple[Tensor, Gradients]:
        """KL of each row (N,), and the gradients of sum_i row_weight_i KL_i. Two products, and one a gradient."""
        task = self.task
        head, target = task.head, task.rows.target
        plan = plan_of(task, limit, gradient_in_forward=False)
        product = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device) if task.need_hidden else None
        head_grads = HeadGradients(task, accumulate=False)
        if row_weight is not None:
            coefs = -row_weight * head.logit_scale, torch.zeros_like(row_weight)  # no label has a term of its own
            head_grads.take_rows(self.x, *coefs, target=None)
        parts, vectors = [], normalizers.vectors()
        for begin, end in plan.slices:
            slab, part = task.backend.kl_logits(
                self.x, head, self.ref_x, self.ref_head, vectors, (begin, end), store=row_weight is not None
            )
            parts.append(part)
            if product is not None:
                matmul(slab, head.weight[begin:end], out=product)
            if row_weight is not None:
                head_grads.add(slab, begin, end)
            del slab  # before the next slice's is made
        hidden_grad = None
        if product is not None:
            hidden_grad = task.hidden.new_zeros(
                task.hidden.shape, dtype=task.wide_dtype
            )  # contiguous, whatever the hidden states are
            finish_hidden_grad(task, product, coefs, target, task.rows.index, hidden_grad)
        return torch.cat(parts).sum(0), Gradients(hidden_grad, *head_grads.result())

    def scatter(self, values: Tensor) -> Tensor:
        """(..., N) values at their positions (..., T), 0 outside the mask."""
        out = values.new_zeros(*values.shape[:-1], self.task.hidden.shape[0])
        return out.index_copy_(-1, self.task.rows.index, values)


def _pair(
    x,
    weight,
    bias,
    ref_x,
    ref_weight,
    ref_bias,
    counted,
    logit_scale,
    softcap,
    impl,
    needs: tuple[bool, bool, bool],
    upstream_later: bool = False,
) -> Pair:
    ends = torch.arange(2, device=x.device) * x.shape[0]  # made on the device: a copy from the host would wait
    rows = compact(torch.where(counted, 0, DEAD_ROW), ends, 1, DEAD_ROW, num_rows=None)
    rows = Rows(rows.index, torch.full_like(rows.target, ELSEWHERE), rows.sequence, rows.starts, rows.host_starts)
    task = Task(x, Head(weight, bias, logit_scale, softcap), rows, *needs, backend_of(impl), None, upstream_later)
    return Pair(task, task.gather(), ref_x[rows.index], Head(ref_weight, ref_bias, logit_scale, softcap))


# ---------------------------------------------------------------------------------------------------------------------
# linear_kl_loss: a weighted sum, gradients formed in the forward
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("npo_kernels::linear_kl_loss", mutates_args=())
@runs_as_written
def linear_kl_loss(
    x: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (T, H_ref)
    ref_weight: Tensor,  # (V, H_ref)
    ref_bias: Tensor | None,  # (V,)
    counted: Tensor,  # (T,) bool
    scale: Tensor,  # (): of the sum
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> scale * the sum over the counted positions, and its gradients as `ops.kept` has them."""
    needs = (need_hidden, need_weight, need_bias)
    pair = _pair(x, weight, bias, ref_x, ref_weight, ref_bias, counted, logit_scale, softcap, impl, needs, True)
    row_weight = scale.expand(pair.x.shape[0]).contiguous() if any(needs) else None
    kl, grads = pair.sweep(pair.normalizers(), row_weight, workspace_bytes)
    return kl.sum() * scale, *kept(grads, x, weight)


@linear_kl_loss.register_fake
def _(x, weight, *rest):
    return x.new_empty((), dtype=torch.float32), *fake_kept(x, weight, *rest[-3:])


linear_kl_loss.register_autograd(scale_kept, setup_context=setup_kept)


# ---------------------------------------------------------------------------------------------------------------------
# linear_kl: KL of each position, with a backward for any upstream gradient
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("npo_kernels::linear_kl", mutates_args=())
@runs_as_written
def linear_kl(
    x: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_x: Tensor,  # (T, H_ref)
    ref_weight: Tensor,  # (V, H_ref)
    ref_bias: Tensor | None,  # (V,)
    counted: Tensor,  # (T,) bool
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """-> (T,) KL of each position, 0 outside the mask; (4, T) the `Normalizers` of both models."""
    none = (False, False, False)
    pair = _pair(x, weight, bias, ref_x, ref_weight, ref_bias, counted, logit_scale, softcap, impl, none)
    normalizers = pair.normalizers()
    kl, _ = pair.sweep(normalizers, None, workspace_bytes)
    return pair.scatter(kl), pair.scatter(torch.stack(tuple(vars(normalizers).values())))


@linear_kl.register_fake
def _(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(4, x.shape[0], dtype=torch.float32)


@torch.library.custom_op("npo_kernels::linear_kl_backward", mutates_args=())
@runs_as_written
def linear_kl_backward(
    grad: Tensor,  # (T,)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_x: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    counted: Tensor,
    normalizers: Tensor,  # (4, T)
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    impl: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dHidden, dWeight, dBias; empty where not needed."""
    needs = (need_hidden, need_weight, need_bias)
    pair = _pair(x, weight, bias, ref_x, ref_weight, ref_bias, counted, logit_scale, softcap, impl, needs)
    index = pair.task.rows.index
    _, grads = pair.sweep(Normalizers(*normalizers.index_select(1, index)), grad[index], workspace_bytes)
    return all_tensors(grads, x, weight)


@linear_kl_backward.register_fake
def _(grad, x, weight, *rest):
    return fake_gradients(x, weight, *rest[-3:])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.options = inputs[7:]


def _backward(ctx, grad, _):
    needs = ctx.options[-3:]
    grads = linear_kl_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 11


linear_kl.register_autograd(_backward, setup_context=_setup)
linear_kl_backward.register_autograd(no_second_derivative)
