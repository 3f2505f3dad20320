"""`fused_linear_kl`: the KL divergence of a model and a reference, each with its own head.

It is a retain term, and the loss of UNDIAL.
"""

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
    """The KL divergence between the next-token distributions of a reference and a model, without forming logits.

    It is the retain term of NPO+KL (arXiv 2404.05868, section 3), and with `target_shift` the self-distillation loss of
    UNDIAL (arXiv 2402.10052). Replaces:

    ```python
    logp = F.linear(hidden, lm_head_weight, bias).float().log_softmax(-1)
    ref_z = F.linear(ref_hidden, ref_lm_head_weight, ref_bias).float()
    ref_logp = (ref_z - target_shift * F.one_hot(labels, ref_z.shape[-1])).log_softmax(-1)
    if direction == "forward":
        kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
    else:
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    loss = kl[mask].mean()
    ```

    Args:
        hidden: the model's last hidden states, (..., H); float32, bfloat16 or float16.
        lm_head_weight: the model's head, (V, H).
        ref_hidden: the reference's last hidden states, (..., H_ref). No gradient flows to the reference. H_ref may
            differ from H.
        ref_lm_head_weight: the reference's head, (V, H_ref), with the V of the model.
        mask: (...) bool, the positions that count, such as `labels != -100`. None counts all positions.
        labels: (...) int64, the token of each position, already shifted: position t predicts labels[t]. Required
            unless `target_shift` is 0, and not read if it is 0. Values outside the mask are not read, so they may be
            -100.
        target_shift: UNDIAL's gamma, subtracted from the reference's logit of the label before the softmax, after
            `logit_scale` and `softcap`. Any finite number; a negative one raises the logit.
        direction: "forward" is KL(reference || model), "reverse" is KL(model || reference).
        reduction: "mean" over the positions of the mask, "sum", or "none" for (...), with 0 outside the mask.
        bias: the model's bias, (V,), or None. A token with a bias of -inf in both models contributes nothing. With
            -inf in only one of them, a KL that is infinite comes out as inf or as a very large number.
        ref_bias: the reference's bias, (V,), or None.
        logit_scale: factor of the logits of both models.
        softcap: softcap of the logits of both models, as in `sequence_logprobs`.
        impl: "triton", "torch" (bounded memory on any device), "reference" (keeps the logits of both models), or
            "auto": Triton on a GPU, torch elsewhere. There is no fallback from an explicit name.
        workspace_mb: upper bound, in MiB, of the memory used beyond inputs, results and gradients, as in
            `sequence_logprobs`. Most of it holds a slice of the gradient of the logits.

    Returns:
        The divergence in nats, float32. An empty mask gives 0 with zero gradients. With "mean" and "sum", the
            gradients are computed in the forward pass (6 products with the heads in all; 8 for "reverse", whose
            gradient needs the KL of the position first). With "none" they are computed in the backward pass (8
            products).

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported. A label outside [0, V) inside the
            mask raises for tensors on a CPU and gives NaN on a GPU, unless `set_debug(True)` enables the check.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        >>> import torch
        >>> from npo_kernels import fused_linear_kl
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(32, 8)
        >>> ref_hidden = hidden.detach() + 0.1
        >>> loss = fused_linear_kl(hidden, lm_head_weight, ref_hidden, lm_head_weight)
        >>> loss.backward()
        >>> loss.item() > 0
        True
        >>> fused_linear_kl(hidden, lm_head_weight, hidden, lm_head_weight).item() < 1e-6
        True
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
