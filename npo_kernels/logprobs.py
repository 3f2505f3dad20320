"""Sequence and token log-probabilities, the primitives of every loss: differentiable, without storing logits."""

from typing import Unpack

import torch
from torch import Tensor

from npo_kernels import reference
from npo_kernels.call.arguments import CallOptions, checked
from npo_kernels.call.call import Call
from npo_kernels.call.checks import check_kept
from npo_kernels.call.prepare import prepare
from npo_kernels.core.value_checks import check_values
from npo_kernels.ops.logprobs import LogpsCall, token_logps
from npo_kernels.ops.token_loss import exact


@checked
def sequence_logprobs(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    **options: Unpack[CallOptions],
) -> tuple[Tensor, Tensor]:
    """The summed log-probability of each sequence's scored tokens, and the number of these tokens.

    Replaces the following, without forming the (B, S, V) logits:

    ```python
    logits = logit_scale * F.linear(hidden, lm_head_weight, bias).float()
    logits = softcap * torch.tanh(logits / softcap)                             # only with a softcap
    scored = labels[:, 1:] != ignore_index
    index = torch.where(scored, labels[:, 1:], 0)[..., None]
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, index).squeeze(-1)
    logps, num_tokens = (logps * scored).sum(-1), scored.sum(-1)
    ```

    Args:
        hidden: last hidden states, padded (B, S, H), or packed (T, H) with `cu_seqlens`; float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`. torch.autocast casts both.
        labels: (B, S) or (T,) int64; `ignore_index` where nothing is scored.
        bias: (V,), in the dtype of `hidden`, or None.
        shift: True if the labels are aligned with the inputs, as for a Hugging Face model: position t is scored on
            labels[t+1], never across a sequence boundary. False if the labels are already shifted.
        cu_seqlens: (B+1,) int32, the cumulative lengths of a packed batch, from 0 to T. Empty sequences are allowed.
        ignore_index: the label of positions that are not scored.
        logit_scale: factor of the logits (Cohere: logit_scale; Granite: 1/logits_scaling).
        softcap: the logits become softcap * tanh(logits / softcap), after the scale (Gemma-2).
        impl: "triton", "torch", "reference" (keeps the logits, in float32 or float64), or "auto": Triton on a GPU,
            torch elsewhere. An implementation that is named explicitly runs or raises; there is no fallback.
        workspace_mb: upper bound, in MiB, of the memory used beyond inputs, results and gradients. A call that needs
            more raises ValueError with the smallest value that works. None: the default of the device (4608 on CUDA,
            352 on a CPU, 1024 elsewhere), or what the smallest plan needs if that is more.
        num_rows: the number of scored positions, or an upper bound of it. Passing it removes the only host sync of
            the call.
        process_group: for a vocabulary-parallel head. Every rank passes the same batch, and its own rows of
            `lm_head_weight` and `bias` in the order of the ranks: plain tensors of any sizes, or DTensors with
            (Shard(0),) on the mesh of the group. Results and the gradient of `hidden` are those of the whole head, on
            every rank.

    Returns:
        `(logps, num_tokens)`. logps is (B,) float32, in nats, differentiable in `hidden`, `lm_head_weight` and `bias`,
            and 0 for a sequence without a scored token. num_tokens is (B,) int64.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported. The message has the value
            received, the value expected, and what to do. A label outside [0, V) raises for tensors on a CPU. For
            tensors on a GPU it gives NaN, because checking would force a device sync; `set_debug(True)` enables the
            check.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.

    Examples:
        >>> import torch
        >>> from npo_kernels import sequence_logprobs
        >>> hidden, lm_head_weight = torch.randn(2, 4, 8), torch.zeros(32, 8)
        >>> labels = torch.tensor([[-100, 5, 6, 7], [-100, -100, 5, -100]])
        >>> sequence_logprobs(hidden, lm_head_weight, labels)  # three tokens and one, each of probability 1/32
        (tensor([-10.3972,  -3.4657]), tensor([3, 1]))
    """
    call = prepare(hidden, lm_head_weight, labels, options)
    return sequence_logps(call)


@checked
def token_logprobs(
    hidden: Tensor,  # (B, S, H) or (T, H)
    lm_head_weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, S) or (T,)
    **options: Unpack[CallOptions],
) -> Tensor:
    """The log-probability of each scored token.

    Replaces the following, without forming the (B, S, V) logits:

    ```python
    log_p = F.linear(hidden, lm_head_weight).float().log_softmax(-1)            # (B, S, V)
    token_logps = log_p[:, :-1].gather(-1, labels[:, 1:, None]).squeeze(-1)
    token_logps = F.pad(token_logps, (0, 1))                                    # 0 at the last position
    ```

    for labels without ignored positions. The keyword arguments not listed here have the meaning that they have in
    `sequence_logprobs`.

    Args:
        hidden: last hidden states, padded (B, S, H) or packed (T, H); float32, bfloat16 or float16.
        lm_head_weight: (V, H), in the dtype of `hidden`.
        labels: (B, S) or (T,) int64, aligned with the inputs; `ignore_index` where nothing is scored.

    Returns:
        float32 of the shape of `labels`, in nats, 0 where nothing is scored; differentiable. With `shift`, entry t is
            the log-probability of labels[t+1], so the last entry of a sequence is 0.

    Raises:
        ValueError: a shape, value or combination of arguments that is not supported, as in `sequence_logprobs`.
        TypeError: an argument of the wrong type or dtype, or one that does not exist.

    Examples:
        >>> import torch
        >>> from npo_kernels import token_logprobs
        >>> hidden, lm_head_weight = torch.randn(1, 4, 8), torch.zeros(32, 8)
        >>> token_logprobs(hidden, lm_head_weight, torch.tensor([[-100, -100, 6, 7]]))
        tensor([[ 0.0000, -3.4657, -3.4657,  0.0000]])
    """
    call = prepare(hidden, lm_head_weight, labels, options)
    check_kept(call)
    if call.execution.impl == "reference":
        tokens = reference_tokens(call)
    else:
        tokens = token_logps(LogpsCall(call, per_token=True)).tokens
    return tokens.reshape(labels.shape)


def sequence_logps(call: Call) -> tuple[Tensor, Tensor]:
    """(logps, num_tokens) of a checked call."""
    check_kept(call)
    if call.execution.impl == "reference":
        return reference.sum_by_sequence(reference_tokens(call), call.positions().offsets), reference_counts(call)
    results = token_logps(LogpsCall(call, per_token=False))
    return results.logps, results.saved.num_tokens


def scored_tokens(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_logps (N,), sequence (N,) int64, logps (B,), num_tokens (B,)) of a checked call, tokens in order.

    If `num_rows` is not the number of scored tokens, token_logps are NaN.
    """
    check_kept(call)
    if call.execution.impl == "reference":
        targets, offsets = call.positions()
        index = (targets != call.ignore_index).nonzero().squeeze(1)
        tokens, sequence = reference_tokens(call), torch.bucketize(index, offsets[1:], right=True)
        return tokens[index], sequence, reference.sum_by_sequence(tokens, offsets), reference_counts(call)
    results = token_logps(LogpsCall(call, per_token=True))
    rows = results.saved
    tokens = results.tokens[rows.positions]
    if call.num_rows is not None:
        tokens = tokens * exact(rows.starts, rows.positions.shape[0])
    return tokens, rows.sequence.clamp(max=call.num_sequences - 1), results.logps, rows.num_tokens


def reference_counts(call: Call) -> Tensor:
    """(B,) int64, number of scored positions of each sequence."""
    targets, offsets = call.positions()
    scored = torch.nn.functional.pad((targets != call.ignore_index).cumsum(0), (1, 0))
    return scored[offsets.clamp(0, targets.shape[0])].diff()


def reference_tokens(call: Call) -> Tensor:
    """(T,) token log-probabilities of impl="reference"."""
    head = call.head
    check_values(call.labels, call.cu_seqlens, call.shift, head.weight.shape[0], call.ignore_index, call.num_rows)
    return reference.token_logps(
        call.hidden, head.weight, call.positions().targets,
        bias=head.bias, ignore_index=call.ignore_index, logit_scale=head.logit_scale, softcap=head.softcap,
    )  # fmt: skip
