"""`token_statistics`: entropy, maximum, mean and variance of the next-token distributions, without logits."""

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
    """Statistics of the distribution p of the next token at each scored position; differentiable, no logits kept.

    Replaces::

        z = logit_scale * F.linear(hidden, lm_head_weight, bias).float()            # then softcap * tanh(./softcap)
        log_p = z.log_softmax(-1)
        logp       = log_p[label]
        entropy    = -(log_p.exp() * log_p).sum(-1)
        max_logit  = z.max(-1).values                                   # its gradient goes to the first such column
        mean_logit = z.mean(-1)
        var_logp   = (log_p.exp() * (log_p + entropy)**2).sum(-1)       # variance of log p_v under p
        argmax     = z.argmax(-1)                                       # the first such column

    One product with the head forward, whatever is asked for, and three in the backward. What a model that is certain
    leaves of 1 - p and of the entropy keeps its digits. Losses that take them are short (and where the gradient of a
    loss is a factor of that of log p, as that of CE-U, `fused_token_loss` costs less than a backward here)::

        def pdu(hidden, lm_head_weight, labels):                        # flat logits on the forget set
            z = token_statistics(hidden, lm_head_weight, labels, ["max_logit", "mean_logit"])
            return (z["max_logit"] - z["mean_logit"]).square().sum() / (labels[:, 1:] != -100).sum()

    Args:
        which: names out of "logp", "entropy", "max_logit", "mean_logit", "var_logp" and "argmax".
        hidden, lm_head_weight, labels, bias, ...: as in `sequence_logprobs`. The labels say which positions are scored.

    Returns:
        For each name, in nats or logits, (B, S) or (T,) float32 (float64 for a float64 reference), 0 where nothing is
        scored. "logp" is that of `token_logprobs` to rounding. "argmax" is int64, has no gradient, and is ignore_index
        where nothing is scored.

    Raises:
        ValueError, TypeError: as in `sequence_logprobs`.
        NotImplementedError: when the gradient is differentiated again.
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
