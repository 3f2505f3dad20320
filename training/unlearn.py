"""Unlearning methods, one table entry each, and the loop they share. No method forms logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_npo_loss
from training.data import Example, collate, shuffled_batches
from training.finetune import Optimizer, token_nll
from training.model import autocast
from training.processes import count, scored_tokens, share

# How far the policy may be from the reference before the first step, in nats of a sequence's log-probability.
STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


class Pair(NamedTuple):
    """A forget batch and retain rows, as many, drawn for it: this process's share, and what means are divided by."""

    forget: dict[str, Tensor]
    retain: dict[str, Tensor]
    ref_logps: Tensor  # (B,) of the forget rows
    num_forget: float | None = None  # sequences of the whole batch, by processes; None: those that are here
    forget_tokens: float | None = None
    retain_tokens: float | None = None


@dataclass(frozen=True)
class Method:
    label: str
    loss: Callable[[PreTrainedModel, Pair, float, float], Tensor]  # (model, pair, beta, retain_weight)


def npo_with_retain(model: PreTrainedModel, pair: Pair, beta: float, retain_weight: float) -> Tensor:
    """(2/beta) mean softplus(beta (logp - ref)) on forget + retain_weight * NLL on retain: arXiv 2404.05868, NPO+RT."""
    npo = partial(fused_npo_loss, ref_logps=pair.ref_logps, beta=beta, normalizer=pair.num_forget)
    forget = model(**pair.forget, fused_unlearning=npo).loss
    return forget + retain_weight * token_nll(model, pair.retain, pair.retain_tokens)


def gradient_ascent(model: PreTrainedModel, pair: Pair, beta: float, retain_weight: float) -> Tensor:
    """Minus the NLL on forget, unbounded below; retain rows, beta and the weight are not used."""
    return -token_nll(model, pair.forget, pair.forget_tokens)


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
            drawn = list(islice(partners, len(members)))
            mine, rows = share(forget, members)
            pair = Pair(
                collate(rows, pad_id, device),
                collate(share(retain, drawn)[1], pad_id, device),
                ref_logps[mine].to(device),
                len(members) / count(),
                scored_tokens(forget, members) / count(),
                scored_tokens(retain, drawn) / count(),
            )
            with autocast(device):
                loss = METHODS[method].loss(optimizer.model, pair, beta, retain_weight)
            losses.append(optimizer.step(loss))
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
    largest = summed = 0.0
    for members in shuffled_batches(forget, batch_size, torch.Generator().manual_seed(0), pool=1):
        batch = collate([forget[i] for i in members], pad_id, device)
        refs = ref_logps[members].to(device)
        npo = partial(fused_npo_loss, ref_logps=refs, beta=beta, reduction="sum", return_stats=True)
        with autocast(device):
            out = model(**batch, fused_unlearning=npo)
        largest = max(largest, out.stats.log_ratio.abs().max().item())
        summed += out.loss.item()
    loss = summed / len(forget)
    if not (largest < tolerance and abs(loss - expected) < tolerance):
        raise RuntimeError(
            f"before the first step the NPO loss is {loss:.6f} and the largest log-ratio {largest:.2e}; expected "
            f"(2/beta) ln 2 = {expected:.6f} and 0 within {tolerance:g}: the model is not the one the reference "
            "log-probabilities were computed with; run again with --fresh"
        )
    return {"loss": loss, "expected_loss": expected, "max_abs_log_ratio": largest}
