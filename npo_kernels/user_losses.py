"""Losses with a `loss_fn` written by the caller, of sequence or token log-probabilities."""

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
    """Statistics of a batch for logging, returned by `fused_logprob_loss(..., return_stats=True)`; detached.

    Attributes:
        logps: (B,) float32, the summed log-probability of the scored tokens of each sequence, in nats.
        num_tokens: (B,) int64, the number of scored tokens of each sequence.
    """

    logps: Tensor
    num_tokens: Tensor


@dataclass(frozen=True)
class TokenStats(LogprobStats):
    """Statistics of a batch for logging, returned by `fused_token_loss(..., return_stats=True)`; detached.

    Attributes:
        logps: (B,) float32, the summed log-probability of the scored tokens of each sequence, in nats.
        num_tokens: (B,) int64, the number of scored tokens of each sequence.
        token_logps: (N,) float32, the log-probability of each scored token, as passed to `loss_fn`.
        sequence: (N,) int64, the index of the sequence of each scored token, as passed to `loss_fn`.
    """

    token_logps: Tensor
    sequence: Tensor


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
    """Any scalar loss of sequence log-probabilities, at the cost of the fused losses.

    Replaces:

    ```python
    logps, num_tokens = sequence_logprobs(hidden, lm_head_weight, labels)
    loss = loss_fn(logps, num_tokens)
    ```

    `loss_fn` runs once, in the forward pass, under autograd: its gradient at `logps` is the factor of each sequence.
    DPO, KTO, or NPO on some rows and the retain likelihood on others are one call, with one gradient of the head.
    Inside torch.compile this function is `sequence_logprobs` followed by `loss_fn`. The keyword arguments not listed
    here have the meaning that they have in `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; `ignore_index` where nothing is scored.
        loss_fn: `loss_fn(logps, num_tokens)` returns a scalar. logps is (B,) float32 in nats, num_tokens (B,) int64. It
            may not use other tensors that require grad, because gradients reach only `hidden`, `lm_head_weight` and
            `bias`; call `sequence_logprobs` for such a loss.
        return_stats: also return a `LogprobStats`.

    Returns:
        The scalar that `loss_fn` returned, differentiable once in `hidden`, `lm_head_weight` and `bias`.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`, or a
            `loss_fn` that does not return a scalar or uses other tensors that require grad.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        NPO on the first row, and the negative log-likelihood per token of the second, which is to be retained:

        >>> import torch
        >>> import torch.nn.functional as F
        >>> from npo_kernels import fused_logprob_loss
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.zeros(32, 8)
        >>> labels = torch.randint(32, (2, 6))
        >>> ref_logps = torch.tensor([-17.3287])
        >>> def loss_fn(logps, num_tokens, beta=0.1):
        ...     forget = (2 / beta) * F.softplus(beta * (logps[:1] - ref_logps)).mean()
        ...     return forget - logps[1:].sum() / num_tokens[1:].sum()
        >>> loss = fused_logprob_loss(hidden, lm_head_weight, labels, loss_fn)
        >>> loss.backward()
        >>> round(loss.item(), 2)  # (2 / 0.1) ln 2 + ln 32
        17.33
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
    """Any scalar loss of token log-probabilities.

    Takes three products with the head for the forward and backward passes together, and two if the head is frozen.
    Replaces, for a padded batch:

    ```python
    scored = labels[:, 1:] != ignore_index
    token_logps = token_logprobs(hidden, lm_head_weight, labels)[:, :-1][scored]                # (N,)
    sequence = scored.nonzero()[:, 0]                                                           # (N,)
    loss = loss_fn(token_logps, sequence, scored.sum(1))
    ```

    `loss_fn` runs once, in the forward pass, under autograd. Forget and retain rows can share a call, with one gradient
    of the head. Inside torch.compile this function is `token_logprobs` followed by `loss_fn`. The keyword arguments not
    listed here have the meaning that they have in `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; `ignore_index` where nothing is scored.
        loss_fn: `loss_fn(token_logps, sequence, num_tokens)` returns a scalar of the N scored tokens, ordered by
            sequence and position. token_logps is (N,) float32 in nats; sequence is (N,) int64, the index of each
            token's sequence; num_tokens is (B,) int64. Token weights of shape (B, S) come into this order by
            `weights[:, 1:][scored]`. It may not use other tensors that require grad.
        return_stats: also return a `TokenStats`.
        num_rows: the exact number of scored tokens, not a bound. A wrong number raises ValueError on a CPU, and gives
            NaN for the loss and the gradients on a GPU.

    Returns:
        The scalar that `loss_fn` returned, differentiable once in `hidden`, `lm_head_weight` and `bias`.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`, or a
            `loss_fn` that does not return a scalar or uses other tensors that require grad.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.
        NotImplementedError: the gradient is differentiated again.

    Examples:
        Weighted gradient ascent (WGA, arXiv 2502.19301):

        >>> import torch
        >>> from npo_kernels import fused_token_loss
        >>> hidden, lm_head_weight = torch.randn(2, 6, 8, requires_grad=True), torch.zeros(32, 8)
        >>> labels = torch.randint(32, (2, 6))
        >>> def loss_fn(token_logps, sequence, num_tokens, beta=1.0):
        ...     weights = token_logps.detach().exp() ** beta
        ...     return (weights * token_logps).mean()
        >>> loss = fused_token_loss(hidden, lm_head_weight, labels, loss_fn)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # -(ln 32) / 32
        -0.1083
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
