"""Sequence and token log-probabilities, differentiable and without logits. All losses are built on them."""

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
    """Summed log-probability of each sequence's scored tokens, and their number.

    Replaces::

        logits = logit_scale * F.linear(hidden, lm_head_weight, bias).float()       # then softcap * tanh(./softcap)
        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None]).squeeze(-1)
        scored = labels[:, 1:] != ignore_index
        return (logps * scored).sum(-1), scored.sum(-1)

    without the (B, S, V) logits ever existing.

    Args:
        hidden: last hidden states, float32, bfloat16 or float16; padded (B, S, H), or packed (T, H) with `cu_seqlens`.
        lm_head_weight: (V, H), of the dtype of `hidden` (torch.autocast casts both).
        labels: int64 of the shape of hidden without H; `ignore_index` where nothing is scored.
        bias: (V,) or None.
        shift: labels are aligned with the inputs, as a Hugging Face model takes them: position t is scored on
            labels[t+1], never across a sequence boundary. False: labels are already shifted.
        cu_seqlens: (B+1,) int32 cumulative lengths of a packed batch, from 0 to T; empty sequences allowed.
        logit_scale: factor of the logits (Cohere: logit_scale; Granite: 1/logits_scaling).
        softcap: logits become softcap * tanh(logits / softcap), after the scale (Gemma-2).
        impl: "triton", "torch", "reference", or "auto" (Triton on a GPU, torch elsewhere). A name never falls back.
        workspace_mb: MiB that may be used beyond inputs, results and gradients: a bound. A call that cannot keep it
            raises ValueError, which says the smallest that works. None: the default of the device
            (`npo_kernels.core.plan`), or more where the smallest plan needs more.
        num_rows: number of scored positions, or a bound above it. Passing it removes the one host sync of the call.
        process_group: ranks that hold the same batch and a part of the vocabulary each, in the order of the ranks:
            lm_head_weight and bias are this rank's rows, plain tensors of any sizes or DTensors with (Shard(0),) on
            the mesh of the group. Results and the gradient of hidden are those of the whole head, on every rank.

    Returns:
        logps (B,) float32 in nats, differentiable in hidden, lm_head_weight and bias; 0 for a sequence without a
        scored token. num_tokens (B,) int64.

    Raises:
        ValueError, TypeError: bad input; the message says what came, what is expected and what to do. A label outside
            [0, V) raises for tensors on the CPU and gives NaN elsewhere, without a sync (`set_debug` makes it raise).
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
    """Log-probability of each scored token, (B, S) or (T,) float32, 0 where nothing is scored; differentiable.

    With `shift`, entry t is the log-probability of labels[t+1], so the last position of a sequence holds 0. Arguments
    and errors as in `sequence_logprobs`.
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

    If `num_rows` is given and is not their exact number, token_logps are NaN.
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
