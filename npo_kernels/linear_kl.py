"""`fused_linear_kl`: KL divergence of a model and a reference, for the KL retain term and UNDIAL."""

import torch
from torch import Tensor

from npo_kernels import reference
from npo_kernels.call.arguments import Direction, Impl, Reduction, checked
from npo_kernels.call.call import KLCall
from npo_kernels.call.checks import check_kept
from npo_kernels.call.prepare import prepare_kl
from npo_kernels.core.value_checks import check_kl_labels
from npo_kernels.ops.linear_kl import KLLossCall, linear_kl, linear_kl_loss


@checked
def fused_linear_kl(
    hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    ref_hidden: Tensor,  # (..., H_ref)
    ref_lm_head_weight: Tensor,  # (V, H_ref)
    *,
    mask: Tensor | None = None,  # (...)
    labels: Tensor | None = None,  # (...)
    target_shift: float = 0.0,
    direction: Direction = "forward",
    reduction: Reduction = "mean",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    workspace_mb: float | None = None,
) -> Tensor:
    """KL of the next-token distributions of a reference and a model: the retain term of NPO+KL (arXiv 2404.05868,
    section 3), and with a `target_shift` the self-distillation of UNDIAL (arXiv 2402.10052).

    Replaces::

        logp = F.linear(hidden, lm_head_weight, bias).float().log_softmax(-1)
        ref_z = F.linear(ref_hidden, ref_lm_head_weight, ref_bias).float()
        ref_logp = (ref_z - target_shift * F.one_hot(labels, V)).log_softmax(-1)
        kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)  # "forward"
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)  # "reverse"
        loss = kl[mask].mean()

    Args:
        hidden, lm_head_weight, bias: the model's, float32, bfloat16 or float16.
        ref_hidden, ref_lm_head_weight, ref_bias: the reference's, no gradient; V must be the model's, H need not. A
            token that a bias of -inf rules out in both counts for nothing. Ruled out in one alone, an infinite KL comes
            as inf or as a number beyond any other.
        mask: bool, the positions that count (labels != -100, say); None counts all.
        labels: int64, the token of each position, already shifted (labels[t] is what position t predicts). Needed where
            target_shift is not 0, not read where it is 0, and read at the positions of the mask only, so -100 may stand
            outside.
        target_shift: how much lower the reference's logit at the label is before its softmax, UNDIAL's gamma: taken off
            the final logit, after logit_scale and softcap. Any finite number; a negative one raises the logit.
        direction: "forward" is KL(reference || model), "reverse" is KL(model || reference).
        reduction: "mean" over the positions of the mask, "sum", or "none" -> (...) with 0 outside the mask.
        logit_scale, softcap: of both models, as in `sequence_logprobs`.
        impl: "triton", "torch" (bounded memory on any device), "reference" (keeps both logits), "auto" (Triton on a
            GPU, torch elsewhere). A name never falls back.
        workspace_mb: MiB for the slice of the logits' gradient held at a time and what goes with it; a bound, as in
            `sequence_logprobs`.

    Returns:
        float32, in nats. An empty mask gives 0 with zero gradients. With "mean" and "sum" the gradients are formed in
        the forward (6 products in all, 8 in the reverse direction, whose gradient needs the KL of the position first),
        with "none" in the backward (8 in either direction).

    Raises:
        ValueError, TypeError: bad input; the message says what came, what is expected and what to do. A label outside
            [0, V) at a position that counts raises for CPU tensors and gives NaN on a GPU (`set_debug(True)` looks).
        NotImplementedError: when the gradient is differentiated again.
    """
    call = prepare_kl(
        hidden, lm_head_weight, ref_hidden, ref_lm_head_weight,
        mask=mask, labels=labels, target_shift=target_shift, direction=direction, bias=bias, ref_bias=ref_bias,
        logit_scale=logit_scale, softcap=softcap, impl=impl, workspace_mb=workspace_mb,
    )  # fmt: skip
    if reduction == "none" or call.execution.impl == "reference":
        check_kept(call)
    if reduction == "none":
        kl = reference_kl(call) if call.execution.impl == "reference" else linear_kl(call).kl
        return kl.reshape(hidden.shape[:-1])
    # explicit float32: 1 / int64 would have the default dtype, which the caller can change
    count = call.counted.sum().clamp(min=1).float() if reduction == "mean" else hidden.new_ones((), dtype=torch.float32)
    if call.execution.impl == "reference":
        return reference_kl(call).sum() / count
    return linear_kl_loss(KLLossCall(call, 1.0 / count)).loss


def reference_kl(call: KLCall) -> Tensor:
    """(T,) KL of each position with impl="reference", 0 outside the mask."""
    if call.labels is not None:
        check_kl_labels(call.labels, call.counted, call.head.weight.shape[0])
    # mask before the products: a non-finite hidden state outside the mask times 0 would make all gradients NaN
    x, ref_x = (torch.where(call.counted.unsqueeze(-1), t, 0.0) for t in (call.hidden, call.ref_hidden))
    labels = None if call.labels is None else torch.where(call.counted, call.labels, 0)
    kl = reference.linear_kl(x, call.head, ref_x, call.ref_head, labels, call.target_shift, call.reverse)
    return torch.where(call.counted, kl, 0.0)
