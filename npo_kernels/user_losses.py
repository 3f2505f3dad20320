"""Loss functions written by the caller, of sequence log-probabilities or of token log-probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Unpack, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from npo_kernels.call.arguments import CallOptions, checked
from npo_kernels.call.call import Call
from npo_kernels.call.prepare import prepare
from npo_kernels.call.rules import check_loss_fn
from npo_kernels.core.value_checks import check_exact_rows
from npo_kernels.logprobs import scored_tokens, sequence_logps
from npo_kernels.ops.token_loss import check_scalar, of_sequences, of_tokens, token_loss

SequenceLoss = Callable[[Tensor, Tensor], Tensor]
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LogprobStats:
    """What a training loop logs; detached."""

    logps: Tensor  # (B,) summed log-probability of the scored tokens
    num_tokens: Tensor  # (B,) int64


@dataclass(frozen=True)
class TokenStats(LogprobStats):
    """The same, and what `loss_fn` was given; detached."""

    token_logps: Tensor  # (N,)
    sequence: Tensor  # (N,) int64


# fmt: off
@overload
def fused_logprob_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: SequenceLoss, *,
    return_stats: Literal[False] = ..., **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def fused_logprob_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: SequenceLoss, *,
    return_stats: Literal[True], **options: Unpack[CallOptions],
) -> tuple[Tensor, LogprobStats]: ...
@overload
def fused_logprob_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: SequenceLoss, *,
    return_stats: bool, **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, LogprobStats]: ...
# fmt: on
@checked
def fused_logprob_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    loss_fn: SequenceLoss,
    *,
    return_stats: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Any scalar loss of sequence log-probabilities, `loss_fn(logps, num_tokens)`, at the cost of the fused losses.

    Replaces::

        logps, num_tokens = sequence_logprobs(hidden, lm_head_weight, labels, ...)
        loss = loss_fn(logps, num_tokens)

    `loss_fn` gets (B,) float32 log-probabilities and (B,) int64 token counts and is run once, inside the forward,
    under autograd, to obtain the gradient of each sequence: DPO, KTO, NPO on some rows and the retain likelihood on
    others, all in one call with one dWeight. Gradients reach hidden, lm_head_weight and bias only: a `loss_fn` that
    uses other tensors that require grad is refused (use `sequence_logprobs` there). Inside torch.compile this is
    `sequence_logprobs` followed by `loss_fn`. `return_stats` also returns `LogprobStats`. Other arguments and errors
    as in `sequence_logprobs`.

    It is `fused_token_loss` with a loss of the sums of each sequence.
    """
    check_loss_fn(loss_fn, "logps, num_tokens")
    call = prepare(hidden, lm_head_weight, labels, options)
    if _forms_gradients(call):
        results = token_loss(call, of_sequences(loss_fn))
        loss, logps, counts = results.loss, results.logps, results.num_tokens
    else:
        logps, counts = sequence_logps(call)
        loss = loss_fn(logps, counts)
        check_scalar(loss, hidden.device)
    return (loss, LogprobStats(logps.detach(), counts)) if return_stats else loss


# fmt: off
@overload
def fused_token_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: TokenLoss, *,
    return_stats: Literal[False] = ..., **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def fused_token_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: TokenLoss, *,
    return_stats: Literal[True], **options: Unpack[CallOptions],
) -> tuple[Tensor, TokenStats]: ...
@overload
def fused_token_loss(
    hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, loss_fn: TokenLoss, *,
    return_stats: bool, **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, TokenStats]: ...
# fmt: on
@checked
def fused_token_loss(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    loss_fn: TokenLoss,
    *,
    return_stats: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, TokenStats]:
    """Any scalar loss of token log-probabilities, `loss_fn(token_logps, sequence, num_tokens)`: three products with the
    head, forward and backward together, and two where the head is frozen.

    Replaces::

        scored = labels[:, 1:] != ignore_index                       # with shift, of a padded batch
        token_logps = token_logprobs(hidden, lm_head_weight, labels, ...)[:, :-1][scored]           # (N,)
        sequence = scored.nonzero()[:, 0]                                                           # (N,)
        loss = loss_fn(token_logps, sequence, scored.sum(1))

    `loss_fn` gets the N scored tokens in the order of sequence and position: (N,) float32 log-probabilities, (N,) int64
    the sequence of each, and (B,) int64 token counts. Weights of a token that come as (B, S) go into the same order by
    `weights[:, 1:][scored]`. As in `fused_logprob_loss` it is run once, inside the forward, under autograd, and may use
    no other tensor that requires grad. Forget and retain rows go into one call, with one dWeight.

        def wga(token_logps, sequence, num_tokens):                  # weighted gradient ascent
            weights = token_logps.detach().exp() ** beta
            return (weights * token_logps).mean()

    `num_rows`, if given, has to be the number of scored tokens and not a bound: otherwise a call on a CPU raises
    ValueError, and elsewhere loss and gradients are NaN. `return_stats` also returns `TokenStats`. Inside torch.compile
    this is `token_logprobs` followed by `loss_fn`. Other arguments and errors as in `sequence_logprobs`.
    """
    check_loss_fn(loss_fn, "token_logps, sequence, num_tokens")
    call = prepare(hidden, lm_head_weight, labels, options)
    if _forms_gradients(call):
        results = token_loss(call, of_tokens(loss_fn))
        loss = results.loss
        stats = TokenStats(results.logps, results.num_tokens, results.token_logps, results.sequence)
    else:
        token_logps, sequence, logps, counts = scored_tokens(call)
        if call.num_rows is not None and not torch.compiler.is_compiling():
            check_exact_rows(counts.sum(), min(call.num_rows, call.labels.numel()))
        loss = loss_fn(token_logps, sequence, counts)
        check_scalar(loss, hidden.device)
        if return_stats:
            stats = TokenStats(logps.detach(), counts, token_logps.detach(), sequence)
    return (loss, stats) if return_stats else loss


def _forms_gradients(call: Call) -> bool:
    """Whether the loss function is evaluated inside the forward, where its gradients are computed."""
    plain = call.execution.impl == "reference" or torch.compiler.is_compiling() or isinstance(call.hidden, FakeTensor)
    return call.execution.needs.any and not plain
