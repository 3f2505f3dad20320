"""Unlearning methods, one table entry each, and the loop they share. No method forms logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_logprob_loss, fused_npo_loss
from training.data import Example, collate, shuffled_batches
from training.finetune import Optimizer, mean_token_nll
from training.model import autocast, hidden_states

# How far the policy may be from the reference before the first step, in nats of a sequence's log-probability.
STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


class Pair(NamedTuple):
    """A forget batch and retain rows, as many, drawn for it."""

    forget: dict[str, Tensor]
    retain: dict[str, Tensor]
    ref_logps: Tensor  # (B,) of the forget rows


@dataclass(frozen=True)
class Method:
    label: str
    loss: Callable[[PreTrainedModel, Pair, float, float], Tensor]  # (model, pair, beta, retain_weight)


def npo_with_retain(model: PreTrainedModel, pair: Pair, beta: float, retain_weight: float) -> Tensor:
    """(2/beta) mean softplus(beta (logp - ref)) on forget + retain_weight * NLL on retain: arXiv 2404.05868, NPO+RT."""
    npo = fused_npo_loss(
        hidden_states(model, pair.forget),
        model.lm_head.weight,
        pair.forget["labels"],
        ref_logps=pair.ref_logps,
        beta=beta,
    )
    retain = fused_logprob_loss(
        hidden_states(model, pair.retain), model.lm_head.weight, pair.retain["labels"], mean_token_nll
    )
    return npo + retain_weight * retain


def gradient_ascent(model: PreTrainedModel, pair: Pair, beta: float, retain_weight: float) -> Tensor:
    """Minus the NLL on forget, unbounded below; retain rows, beta and the weight are not used."""

    def mean_token_logp(logps: Tensor, num_tokens: Tensor) -> Tensor:
        return -mean_token_nll(logps, num_tokens)

    hidden = hidden_states(model, pair.forget)
    return fused_logprob_loss(hidden, model.lm_head.weight, pair.forget["labels"], mean_token_logp)


METHODS = {
    "npo_rt": Method("NPO + retain", npo_with_retain),
    "ga": Method("Gradient ascent", gradient_ascent),
}


def unlearn(
    model: PreTrainedModel,
    method: str,
    forget: Sequence[Example],
    retain: Sequence[Example],
    ref_logps: Tensor,  # (len(forget),)
    pad_id: int,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    beta: float,
    retain_weight: float,
    seed: int,
) -> Iterator[float]:
    """Train in place; after each epoch over the forget set its mean loss is yielded, for the caller to evaluate.

    Every epoch draws its retain rows anew from a seeded generator, without repetition while there are enough.
    """
    device, generator = model.device, torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(forget) // batch_size)
    optimizer = Optimizer(model, lr, epochs * steps_per_epoch, warmup_steps=steps_per_epoch)
    for _ in range(epochs):
        model.train()
        losses = []
        partners = _shuffled_forever(len(retain), generator)
        for members in shuffled_batches(forget, batch_size, generator, pool=1):
            pair = Pair(
                collate([forget[i] for i in members], pad_id, device),
                collate([retain[i] for i in islice(partners, len(members))], pad_id, device),
                ref_logps[members].to(device),
            )
            with autocast(device):
                loss = METHODS[method].loss(model, pair, beta, retain_weight)
            optimizer.step(loss)
            losses.append(loss.item())
        yield sum(losses) / len(losses)


def _shuffled_forever(num_rows: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(num_rows, generator=generator).tolist()


@torch.no_grad()
def check_step_zero(
    model: PreTrainedModel, forget: Sequence[Example], ref_logps: Tensor, pad_id: int, *, batch_size: int, beta: float
) -> dict[str, float]:
    """With the policy equal to the reference every log-ratio is 0 and the NPO loss is (2/beta) ln 2: assert it.

    Batches are shuffled, unlike those of the cache, so rows that lost their reference would show.
    """
    device, expected = model.device, 2 / beta * math.log(2)
    tolerance = STEP_ZERO_TOLERANCE["bfloat16" if device.type == "cuda" else "float32"]
    largest = total = 0.0
    for members in shuffled_batches(forget, batch_size, torch.Generator().manual_seed(0), pool=1):
        batch = collate([forget[i] for i in members], pad_id, device)
        with autocast(device):
            losses, stats = fused_npo_loss(
                hidden_states(model, batch),
                model.lm_head.weight,
                batch["labels"],
                ref_logps=ref_logps[members].to(device),
                beta=beta,
                reduction="sum",
                return_stats=True,
            )
        largest = max(largest, stats.log_ratio.abs().max().item())
        total += losses.item()
    loss = total / len(forget)
    if not (largest < tolerance and abs(loss - expected) < tolerance):
        raise RuntimeError(
            f"before the first step the NPO loss is {loss:.6f} and the largest log-ratio {largest:.2e}; expected "
            f"(2/beta) ln 2 = {expected:.6f} and 0 within {tolerance:g}: the model is not the one the reference "
            "log-probabilities were computed with; run again with --fresh"
        )
    return {"loss": loss, "expected_loss": expected, "max_abs_log_ratio": largest}
