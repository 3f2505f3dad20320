"""The losses of the NPO and SimNPO papers: sequence log-probabilities and `npo_kernels.core.formulas`, combined."""

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
    """Statistics of a batch for logging, returned by `return_stats=True`; detached.

    Attributes:
        logps: (B,) float32, the summed log-probability of the scored tokens of each sequence, in nats.
        log_ratio: (B,) float32, r: logps - ref_logps for NPO, logps / num_tokens + gamma for SimNPO.
        weight: (B,) float32, 2 sigmoid(beta r), the factor of a sequence's gradient: 1 is gradient ascent, 0 means
            that the sequence is forgotten.
        num_tokens: (B,) int64, the number of scored tokens of each sequence.
    """

    logps: Tensor
    log_ratio: Tensor
    weight: Tensor
    num_tokens: Tensor


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
    """The NPO loss (Negative Preference Optimization, arXiv 2404.05868, equation 3), without forming logits.

    Replaces:

    ```python
    logits = F.linear(hidden, lm_head_weight).float()                                  # (B, S, V)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None]).squeeze(-1).sum(-1)
    loss = (2 / beta) * F.softplus(beta * (logps - ref_logps)).mean()                  # -(2/beta) log sigmoid(-beta r)
    ```

    for labels without ignored positions. The keyword arguments not listed here have the meaning that they have in
    `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; `ignore_index` where nothing is scored.
        ref_logps: (B,) float32, the reference model's summed log-probability of the same labels. Cache it with
            `sequence_logprobs`; the loss of an unchanged model is then (2/beta) ln 2. No gradient flows to it.
        beta: inverse temperature, > 0. As beta approaches 0, the gradient approaches that of gradient ascent.
        reduction: "mean" over the sequences with at least one scored token, "sum", or "none" for (B,), with 0 for
            sequences without a scored token.
        normalizer: a number or 0-d tensor that replaces the count in "mean", such as the number of sequences of the
            whole accumulated or distributed batch.
        weights: (B,) constant factors >= 0 of each sequence's loss. A sequence of weight 0 gets no gradient. "mean"
            still divides by the count of sequences. None means 1 for all.
        return_stats: also return a `LossStats`.

    Returns:
        The loss in nats, float32, differentiable once in `hidden`, `lm_head_weight` and `bias`. It is 0 with zero
            gradients if all positions are ignored. With "mean" and "sum", the gradients are computed in the forward
            pass, where they cost least.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        >>> import torch
        >>> from npo_kernels import fused_npo_loss, sequence_logprobs
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(32, 8)
        >>> labels = torch.randint(32, (2, 6))
        >>> ref_logps, num_tokens = sequence_logprobs(hidden.detach(), lm_head_weight, labels)
        >>> loss = fused_npo_loss(hidden, lm_head_weight, labels, ref_logps=ref_logps, beta=0.1)
        >>> loss.backward()
        >>> round(loss.item(), 2)  # (2 / 0.1) ln 2
        13.86
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
    """The SimNPO loss (arXiv 2410.07163): NPO on length-normalised log-probabilities, without a reference model.

    Replaces:

    ```python
    logps, num_tokens = sequence_logprobs(hidden, lm_head_weight, labels)
    nll = -logps / num_tokens                                      # mean over the scored tokens of each sequence
    loss = (2 / beta) * F.softplus(-beta * (nll - gamma)).mean()   # -(2/beta) log sigmoid(beta (nll - gamma))
    ```

    gamma is multiplied by beta, as in the paper's code. The keyword arguments not listed here have the meaning that
    they have in `fused_npo_loss` and `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; `ignore_index` where nothing is scored.
        beta: inverse temperature, > 0.
        gamma: the reward margin of the paper, in nats per token.
        return_stats: also return a `LossStats`.

    Returns:
        The loss in nats, float32, as returned by `fused_npo_loss`.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        >>> import torch
        >>> from npo_kernels import fused_simnpo_loss
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.zeros(32, 8)
        >>> labels = torch.randint(32, (2, 6))
        >>> loss, stats = fused_simnpo_loss(hidden, lm_head_weight, labels, beta=4.5, return_stats=True)
        >>> loss.backward()
        >>> stats.log_ratio  # all logits are 0, so a token has the log-probability -ln 32
        tensor([-3.4657, -3.4657])
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
