"""Relearning: fine-tuning on a part of the forget set, which may bring back the rest (Hu et al. 2024, arXiv
2406.13356)."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from training.config import TrainConfig
from training.data import Example
from training.scoring import score
from training.steps import Batches, FinetuningSteps
from training.trainer import Trainer


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(relearned, others): a seeded choice of a share of the examples, at least one of each.

    ValueError where there is only one example.
    """
    if len(examples) < 2:
        raise ValueError(f"relearning: expected at least 2 examples of the forget set, got {len(examples)}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    relearned, others = ([examples[i] for i in sorted(part)] for part in (order[:cut], order[cut:]))
    return relearned, others


def relearn_(
    model: PreTrainedModel,
    relearned: list[Example],
    others: list[Example],
    pad_id: int,
    config: TrainConfig,
    follow: bool = True,
) -> list[dict[str, float]]:
    """Train in place. Returns [{"step", "relearned", "others"}].

    The values are mean answer probabilities, before the first and after every step.

    All weights are trained, also those that unlearning left alone. With `follow` false, nothing is measured.
    """
    history: list[dict[str, float]] = []
    model.requires_grad_(True)

    def measure() -> None:
        probability = [score(model, rows, pad_id).answer_probability.mean().item() for rows in (relearned, others)]
        history.append({"step": len(history), "relearned": probability[0], "others": probability[1]})

    if follow:
        measure()
    steps = FinetuningSteps(relearned, config, Batches(pad_id, model.device, packing=False))
    Trainer(model, config, len(steps)).train(steps, after_step=lambda metrics: measure() if follow else None)
    return history
