"""NPO and SimNPO on last hidden states: sequence log-probabilities and the formulas of `npo_kernels.core.formulas`."""

from dataclasses import dataclass
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from npo_kernels.call.arguments import LossOptions, checked
from npo_kernels.call.call import Call
from npo_kernels.call.checks import check_normalizer, check_per_sequence
from npo_kernels.call.prepare import prepare
from npo_kernels.core import formulas
from npo_kernels.core.value_checks import check_factors
from npo_kernels.logprobs import sequence_logps
from npo_kernels.ops.ratio_loss import RatioCall, ratio_loss


@dataclass(frozen=True)
class LossStats:
    """What a training loop logs; detached."""

    logps: Tensor  # (B,) summed log-probability of the scored tokens
    log_ratio: Tensor  # (B,) r: logps - ref_logps (NPO), logps / num_tokens + gamma (SimNPO)
    weight: Tensor  # (B,) 2 sigmoid(beta r): 1 = gradient ascent, 0 = forgotten
    num_tokens: Tensor  # (B,) int64


# fmt: off
@overload
def fused_npo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    ref_logps: Tensor, beta: float = ..., return_stats: Literal[False] = ..., **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def fused_npo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    ref_logps: Tensor, beta: float = ..., return_stats: Literal[True], **options: Unpack[LossOptions],
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_npo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    ref_logps: Tensor, beta: float = ..., return_stats: bool, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]: ...
# fmt: on
@checked
def fused_npo_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    *,
    ref_logps: Tensor,  # (B,)
    beta: float = 0.1,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """Negative Preference Optimization (arXiv 2404.05868, equation 3) on last hidden states; no logits are formed.

    Replaces::

        logps, _ = ...log_softmax over the (B, S, V) logits, summed over the scored tokens of each sequence...
        loss = (2 / beta) * softplus(beta * (logps - ref_logps))       # = -(2/beta) log sigmoid(-beta log_ratio)

    Args:
        hidden, lm_head_weight, labels, bias, shift, cu_seqlens, ignore_index, logit_scale, softcap, impl,
            workspace_mb, num_rows, process_group: as in `sequence_logprobs`.
        ref_logps: (B,) float32, the reference model's summed log-probability of the same labels, best cached from
            `sequence_logprobs` itself: then the first loss is (2/beta) ln 2. No gradient flows to it.
        beta: inverse temperature; towards 0 the gradient becomes that of gradient ascent.
        reduction: "mean" over the sequences that have a scored token, "sum", or "none" -> (B,), 0 for the others.
        normalizer: a number or 0-d tensor that replaces the count of "mean": the number of sequences in the whole
            accumulated or distributed batch.
        weights: (B,) a constant factor >= 0 of the loss of each sequence (its influence, say); a sequence of weight 0
            gets no gradient. "mean" still divides by the count. None: 1 for all.
        return_stats: also return `LossStats`.

    Returns:
        The loss, float32, differentiable once in hidden, lm_head_weight and bias; with all positions ignored it is 0
        with zero gradients. With "mean" and "sum" the gradients are formed in the forward, where they cost least.

    Raises:
        ValueError, TypeError: as in `sequence_logprobs`.
        NotImplementedError: when the gradient is differentiated again.
    """
    call = prepare(hidden, lm_head_weight, labels, options)
    remedy = "pass the summed log-probability of each sequence"
    check_per_sequence("ref_logps", ref_logps, call.num_sequences, hidden.device, remedy)
    return _ratio_loss(call, ref_logps.detach(), beta, False, options, return_stats)


# fmt: off
@overload
def fused_simnpo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    beta: float = ..., gamma: float = ..., return_stats: Literal[False] = ..., **options: Unpack[LossOptions],
) -> Tensor: ...
@overload
def fused_simnpo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    beta: float = ..., gamma: float = ..., return_stats: Literal[True], **options: Unpack[LossOptions],
) -> tuple[Tensor, LossStats]: ...
@overload
def fused_simnpo_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *,
    beta: float = ..., gamma: float = ..., return_stats: bool, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]: ...
# fmt: on
@checked
def fused_simnpo_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    *,
    beta: float = 4.5,
    gamma: float = 0.0,
    return_stats: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, LossStats]:
    """SimNPO (arXiv 2410.07163): NPO without a reference, on the length-normalised log-probability.

    Replaces::

        nll = -logps / num_tokens                                      # per sequence, mean over its scored tokens
        loss = (2 / beta) * softplus(-beta * (nll - gamma))            # = -(2/beta) log sigmoid(beta (nll - gamma))

    with gamma inside the factor beta, as the paper's code has it. Arguments, results and errors as in
    `fused_npo_loss`, without `ref_logps`.
    """
    call = prepare(hidden, lm_head_weight, labels, options)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    offset = torch.full((call.num_sequences,), -float(gamma), dtype=dtype, device=hidden.device)
    return _ratio_loss(call, offset, beta, True, options, return_stats)


def _ratio_loss(
    call: Call,
    offset: Tensor,  # (B,)
    beta: float,
    length_normalized: bool,
    options: LossOptions,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]:
    beta, reduction, normalizer, weights = float(beta), options["reduction"], options["normalizer"], options["weights"]
    check_normalizer(reduction, normalizer)
    if weights is not None:
        remedy = "pass a factor for each sequence"
        check_per_sequence("weights", weights, call.num_sequences, offset.device, remedy)
        weights = weights.detach()
    if call.execution.impl == "reference" or reduction == "none":
        logps, counts = sequence_logps(call)
        if not torch.compiler.is_compiling():
            check_factors(offset, normalizer if isinstance(normalizer, Tensor) else None, weights, counts)
        ratio = formulas.log_ratio(logps, counts, offset.to(logps.dtype), length_normalized)
        scale = formulas.sequence_scale(counts, reduction, normalizer, weights, logps.dtype).to(logps.dtype)
        loss = formulas.reduce(scale, ratio, logps, beta)
        loss = loss if reduction == "none" else loss.sum()
    else:
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(offset.device, torch.float32, non_blocking=True)
        elif normalizer is not None:  # torch.full fills on the device; torch.tensor would copy from the host
            normalizer = torch.full((), normalizer, dtype=torch.float32, device=offset.device)
        offset = offset.float().contiguous()
        weights = None if weights is None else weights.float().contiguous()
        results = ratio_loss(RatioCall(call, offset, normalizer, weights, beta, length_normalized, reduction))
        loss, logps, counts = results.loss, results.logps, results.num_tokens
    if not return_stats:
        return loss
    logps = logps.detach()
    ratio = formulas.log_ratio(logps, counts, offset.to(logps.dtype), length_normalized)
    return loss, LossStats(logps, ratio, formulas.ratio_weight(ratio, beta), counts)
