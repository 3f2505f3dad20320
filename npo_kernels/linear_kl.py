"""`fused_linear_kl`: KL(reference || model) of two heads on two hidden states, neither set of logits kept.

    KL_i = sum_v q_iv (log q_iv - log p_iv),   p = softmax(z), q = softmax(z_ref)
    dKL_i / dz_iv = p_iv - q_iv

A few rows of both logits exist at a time, in float32, as many as the workspace holds; the backward forms them again.
Plain PyTorch products on every device; positions outside the mask cost nothing.
"""

import torch
from torch import Tensor

from npo_kernels.head import Head
from npo_kernels.inputs import autocast_inputs
from npo_kernels.modes import Gradients
from npo_kernels.ops import all_tensors, fake_gradients, no_second_derivative, plain_dtypes
from npo_kernels.plan import workspace_bytes
from npo_kernels.products import matmul
from npo_kernels.torch_backend import BLOCK_V, logits_block, slab_dtype
from npo_kernels.validation import check_kl, check_options, refuse_unknown


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
    **unknown,
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
        impl: "torch" (bounded memory on any device), "reference" (keeps both logits), "auto" (torch).
        workspace_mb: MiB for the rows of logits held at a time.

    Returns:
        float32, in nats. An empty mask gives 0 with zero gradients.

    Raises:
        ValueError, TypeError: bad input; the message says what came, what is expected and what to do.
        NotImplementedError: when the gradient is differentiated again.
    """
    refuse_unknown("fused_linear_kl", unknown)
    device = hidden.device
    hidden, lm_head_weight, bias = autocast_inputs(hidden, lm_head_weight, bias)
    ref_hidden, ref_lm_head_weight, ref_bias = autocast_inputs(ref_hidden, ref_lm_head_weight, ref_bias)
    check_kl(hidden, lm_head_weight, bias, ref_hidden, ref_lm_head_weight, ref_bias, mask, reduction, impl)
    check_options(logit_scale=logit_scale, softcap=softcap, ignore_index=-100, workspace_mb=workspace_mb, num_rows=None)
    shape = hidden.shape[:-1]
    x, ref_x = hidden.reshape(-1, hidden.shape[-1]), ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    counted = torch.ones(x.shape[0], dtype=torch.bool, device=device) if mask is None else mask.reshape(-1)
    ref_head = (ref_lm_head_weight.detach(), None if ref_bias is None else ref_bias.detach())
    numbers = (float(logit_scale), None if softcap is None else float(softcap))

    if impl == "reference":
        kl = reference_kl(x, Head(lm_head_weight, bias, *numbers), ref_x, Head(*ref_head, *numbers))
        kl = torch.where(counted, kl, 0.0)
        if reduction == "none":
            return kl.reshape(shape)
        return kl.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)

    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, lm_head_weight, bias))
    limit = workspace_bytes(workspace_mb, device)
    kl = linear_kl(x, lm_head_weight, bias, ref_x, *ref_head, counted, *numbers, limit, *needs)
    if reduction == "none":
        return kl.reshape(shape)
    return kl.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)


def reference_kl(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Tensor:
    """The oracle: (N,) KL(ref || model) in plain PyTorch, any dtype, differentiable to any order."""
    logp, ref_logp = (torch.log_softmax(_all_logits(*side), dim=-1) for side in ((x, head), (ref_x, ref_head)))
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def _all_logits(x: Tensor, head: Head) -> Tensor:
    z = torch.nn.functional.linear(x, head.weight, head.bias)
    z = head.logit_scale * (z if z.dtype == torch.float64 else z.float())
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


@torch.library.custom_op("npo_kernels::linear_kl", mutates_args=())
@plain_dtypes
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Tensor:
    """(T,) KL of each position, 0 outside the mask."""
    sides = ((x, Head(weight, bias, logit_scale, softcap)), (ref_x, Head(ref_weight, ref_bias, logit_scale, softcap)))
    out = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    for rows in _chunks(counted, weight.shape[0], workspace_bytes):
        logp, ref_logp = (_log_softmax(side[rows], head)[0] for side, head in sides)
        logp.sub_(ref_logp).mul_(ref_logp.exp_())  # q (log p - log q)
        out[rows] = -logp.sum(1)
    return out


@linear_kl.register_fake
def _(x, *_):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("npo_kernels::linear_kl_backward", mutates_args=())
@plain_dtypes
def linear_kl_backward(
    grad: Tensor,  # (T,)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_x: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    counted: Tensor,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dHidden, dWeight, dBias; empty where not needed."""
    head, ref_head = (Head(w, b, logit_scale, softcap) for w, b in ((weight, bias), (ref_weight, ref_bias)))
    dtype = slab_dtype(x)
    hidden_grad = torch.zeros_like(x) if need_hidden else None
    weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if need_weight else None
    bias_grad = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device) if need_bias else None
    for rows in _chunks(counted, weight.shape[0], workspace_bytes):
        logp, capped = _log_softmax(x[rows], head)
        slab = logp.exp_().sub_(_log_softmax(ref_x[rows], ref_head)[0].exp_())  # p - q
        if capped is not None:
            slab.mul_(capped.square_().neg_().add_(1.0))
        row_weight = grad[rows] * logit_scale
        if bias_grad is not None:
            bias_grad += row_weight @ slab
        slab = slab.to(dtype)
        if hidden_grad is not None:
            hidden_grad[rows] = (matmul(slab, weight) * row_weight.unsqueeze(1)).to(x.dtype)
        if weight_grad is not None:
            matmul(slab.t(), (x[rows] * row_weight.unsqueeze(1)).to(dtype), out=weight_grad)
    found = (t if t is None else t.to(weight.dtype) for t in (weight_grad, bias_grad))
    return all_tensors(Gradients(hidden_grad, *found), x, weight)


@linear_kl_backward.register_fake
def _(grad, x, weight, *rest):
    return fake_gradients(x, weight, *rest[-3:])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx, grad):
    needs = ctx.options[-3:]
    grads = linear_kl_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 10


linear_kl.register_autograd(_backward, setup_context=_setup_context)
linear_kl_backward.register_autograd(no_second_derivative)


def _chunks(counted: Tensor, vocab_size: int, limit: int) -> tuple[Tensor, ...]:
    """Indices of the counted positions, as many at a time as three float32 rows of logits each fit the limit."""
    return counted.nonzero().squeeze(1).split(max(1, limit // (12 * vocab_size)))


def _log_softmax(x: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """(n, V) float32 log-probabilities and, with a softcap, tanh of the capped logits."""
    z = torch.empty(x.shape[0], head.weight.shape[0], dtype=torch.float32, device=x.device)
    for begin in range(0, z.shape[1], BLOCK_V):
        end = min(begin + BLOCK_V, z.shape[1])
        logits_block(x, head.columns(begin, end), z[:, begin:end])
    capped = None
    if head.softcap is not None:
        capped = torch.tanh(z / head.softcap)
        z = capped * head.softcap
    return z.sub_(torch.logsumexp(z, dim=1, keepdim=True)), capped
