"""`token_statistics`: entropy, maximum, mean and variance of the next-token distributions, without storing logits."""

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from npo_kernels import reference
from npo_kernels.call.arguments import CallOptions, checked
from npo_kernels.call.call import Call
from npo_kernels.call.checks import check_kept
from npo_kernels.call.prepare import prepare
from npo_kernels.core.layout import PADDING_ROW
from npo_kernels.core.row_moments import NAMES
from npo_kernels.core.value_checks import check_values
from npo_kernels.ops import token_statistics as operators

Statistic = Literal["logp", "entropy", "max_logit", "mean_logit", "var_logp", "argmax"]


@checked
def token_statistics(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    which: Sequence[Statistic],
    **options: Unpack[CallOptions],
) -> dict[str, Tensor]:
    """Statistics of the next-token distribution p at each scored position: differentiable, without storing logits.

    Replaces, at each scored position with the label `label`:

    ```python
    z = F.linear(hidden, lm_head_weight, bias).float()              # (..., V), then logit_scale and softcap
    log_p = z.log_softmax(-1)
    logp = log_p.gather(-1, label[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    max_logit = z.max(-1).values                                    # its gradient goes to the first maximum
    mean_logit = z.mean(-1)
    var_logp = (log_p.exp() * (log_p + entropy[..., None]) ** 2).sum(-1)            # variance of log p under p
    argmax = z.argmax(-1)                                           # the first maximum
    ```

    The forward pass takes one product with the head, whichever statistics are requested, and the backward pass three.
    Where p of one token is close to 1, the entropy keeps its relative precision. If the gradient of a loss is a factor
    per token times the gradient of log p, as in CE-U, `fused_token_loss` costs less. The keyword arguments not listed
    here have the meaning that they have in `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; they determine which positions are scored.
        which: any of "logp", "entropy", "max_logit", "mean_logit", "var_logp" and "argmax".

    Returns:
        A tensor of the shape of `labels` for each name, float32 (float64 for a float64 reference), in nats or in units
            of the logits, 0 where nothing is scored. "logp" equals `token_logprobs` up to rounding. "argmax" is int64,
            has no gradient, and is `ignore_index` where nothing is scored.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        The loss of PDU (arXiv 2506.05314), which flattens the logits on the forget set:

        >>> import torch
        >>> from npo_kernels import token_statistics
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(32, 8)
        >>> labels = torch.randint(32, (2, 6))
        >>> z = token_statistics(hidden, lm_head_weight, labels, ["max_logit", "mean_logit"])
        >>> loss = (z["max_logit"] - z["mean_logit"]).square().sum() / labels[:, 1:].numel()
        >>> loss.backward()
        >>> sorted(z), z["max_logit"].shape
        (['max_logit', 'mean_logit'], torch.Size([2, 6]))
    """
    call = prepare(hidden, lm_head_weight, labels, options)
    check_kept(call)
    if call.execution.impl == "reference":
        values = reference_statistics(call)
    else:
        results = operators.token_statistics(call)
        values = dict(zip(NAMES, results.values, strict=True))
        if "argmax" in which:
            values["argmax"] = _argmax(results.saved, labels.numel(), call.ignore_index)
    return {name: values[name].reshape(labels.shape) for name in which}


def _argmax(saved: operators.SavedMoments, total: int, ignore_index: int) -> Tensor:
    """(T,) int64, ignore_index where nothing is scored."""
    found = saved.argmax.new_full((total + 1,), ignore_index)
    found[torch.where(saved.target != PADDING_ROW, saved.positions, total)] = (
        saved.argmax
    )  # padding rows: the extra entry
    return found[:-1]


def reference_statistics(call: Call) -> dict[str, Tensor]:
    """Statistics of impl="reference", (T,) each."""
    head = call.head
    batch = call.labels, call.cu_seqlens, call.shift
    check_values(*batch, head.weight.shape[0], call.ignore_index, call.num_rows)
    return reference.token_statistics(call.hidden, head, call.positions().targets, call.ignore_index)
