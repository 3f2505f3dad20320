"""The public losses: thin compositions of sequence log-probabilities and the formulas of `formulas.py`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from npo_kernels.call.arguments import checked
from npo_kernels.call.checks import check_factors, check_normalizer, check_ref_logps
from npo_kernels.call.prepare import Inputs, prepare
from npo_kernels.core import formulas
from npo_kernels.logprobs import sequence_logps
from npo_kernels.ops import logprobs as ops
from npo_kernels.ops.logprob_loss import logprob_loss


@dataclass(frozen=True)
class LossStats:
    """What a training loop logs; detached."""

    logps: Tensor  # (B,) summed log-probability of the scored tokens
    log_ratio: Tensor  # (B,) r: logps - ref_logps (NPO), logps / num_tokens + gamma (SimNPO)
    weight: Tensor  # (B,) 2 sigmoid(beta r): 1 = gradient ascent, 0 = forgotten
    num_tokens: Tensor  # (B,) int64


@checked
def fused_npo_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    *,
    ref_logps: Tensor,  # (B,)
    beta: float = 0.1,
    bias: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    num_rows: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    return_stats: bool = False,
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
        return_stats: also return `LossStats`.

    Returns:
        The loss, float32, differentiable once in hidden, lm_head_weight and bias; with all positions ignored it is 0
        with zero gradients. With "mean" and "sum" the gradients are formed in the forward, where they cost least.

    Raises:
        ValueError, TypeError: as in `sequence_logprobs`.
        NotImplementedError: when the gradient is differentiated again.
    """
    check_normalizer(reduction, normalizer)
    call = prepare(
        hidden, lm_head_weight, labels,
        bias=bias, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index, logit_scale=logit_scale,
        softcap=softcap, impl=impl, workspace_mb=workspace_mb, num_rows=num_rows,
        process_group=process_group,
    )  # fmt: skip
    check_ref_logps(ref_logps, call.num_sequences, hidden.device)
    return _ratio_loss(call, ref_logps.detach(), beta, False, reduction, normalizer, return_stats)


@checked
def fused_simnpo_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    *,
    beta: float = 4.5,
    gamma: float = 0.0,
    bias: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    num_rows: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """SimNPO (arXiv 2410.07163): NPO without a reference, on the length-normalised log-probability.

    Replaces::

        nll = -logps / num_tokens                                      # per sequence, mean over its scored tokens
        loss = (2 / beta) * softplus(-beta * (nll - gamma))            # = -(2/beta) log sigmoid(beta (nll - gamma))

    with gamma inside the factor beta, as the paper's code has it. Arguments, results and errors as in
    `fused_npo_loss`, without `ref_logps`.
    """
    check_normalizer(reduction, normalizer)
    call = prepare(
        hidden, lm_head_weight, labels,
        bias=bias, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index, logit_scale=logit_scale,
        softcap=softcap, impl=impl, workspace_mb=workspace_mb, num_rows=num_rows,
        process_group=process_group,
    )  # fmt: skip
    offset = torch.full((call.num_sequences,), -float(gamma), dtype=torch.float32, device=hidden.device)
    return _ratio_loss(call, offset, beta, True, reduction, normalizer, return_stats)


@checked
def fused_logprob_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
    workspace_mb: float | None = None,
    num_rows: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Any scalar loss of sequence log-probabilities, `loss_fn(logps, num_tokens)`, at the cost of the fused losses.

    Replaces::

        logps, num_tokens = sequence_logprobs(hidden, lm_head_weight, labels, ...)
        loss = loss_fn(logps, num_tokens)

    `loss_fn` gets (B,) float32 log-probabilities and (B,) int64 token counts and is run once, inside the forward,
    under autograd, to obtain the gradient of each sequence: DPO, KTO, NPO on some rows and the retain likelihood on
    others, all in one call with one dWeight. Gradients reach hidden, lm_head_weight and bias only: a `loss_fn` that
    uses other tensors that require grad is refused (use `sequence_logprobs` there). Inside torch.compile this is
    `sequence_logprobs` followed by `loss_fn`. Other arguments and errors as in `sequence_logprobs`.
    """
    call = prepare(
        hidden, lm_head_weight, labels,
        bias=bias, shift=shift, cu_seqlens=cu_seqlens, ignore_index=ignore_index, logit_scale=logit_scale,
        softcap=softcap, impl=impl, workspace_mb=workspace_mb, num_rows=num_rows,
        process_group=process_group,
    )  # fmt: skip
    return logprob_loss(call, loss_fn)


def _ratio_loss(
    call: Inputs,
    offset: Tensor,  # (B,)
    beta: float,
    length_normalized: bool,
    reduction: str,
    normalizer: float | Tensor | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, LossStats]:
    beta = float(beta)
    if call.impl == "reference" or reduction == "none":
        logps, counts = sequence_logps(call)
        if not torch.compiler.is_compiling():
            check_factors(offset, normalizer if isinstance(normalizer, Tensor) else None, counts)
        ratio = formulas.log_ratio(logps, counts, offset.to(logps.dtype), length_normalized)
        scale = formulas.sequence_scale(counts, reduction, normalizer).to(logps.dtype)
        loss = formulas.reduce(scale, formulas.ratio_loss(ratio, beta))
        loss = loss if reduction == "none" else loss.sum()
    else:
        if isinstance(normalizer, Tensor):
            normalizer = normalizer.to(offset.device, torch.float32, non_blocking=True)
        elif normalizer is not None:  # full, not tensor: a fill on the device instead of a copy from the host
            normalizer = torch.full((), normalizer, dtype=torch.float32, device=offset.device)
        loss, logps, counts = ops.ratio_loss(
            *call.batch_args,
            offset.float().contiguous(),
            normalizer,
            beta,
            length_normalized,
            reduction,
            *call.option_args,
        )[:3]
    if not return_stats:
        return loss
    logps = logps.detach()
    ratio = formulas.log_ratio(logps, counts, offset.to(logps.dtype), length_normalized)
    return loss, LossStats(logps, ratio, formulas.ratio_weight(ratio, beta), counts)
