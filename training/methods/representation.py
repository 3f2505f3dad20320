"""RMU: what a layer makes of the forget set is steered to a random direction, and kept as it was on the retain set."""

import torch
from torch import Tensor

from training.methods.base import Sizes, register_family
from training.methods.rows import Batch, Rows, within_sequences
from training.methods.settings import Settings
from training.require import require


def rmu(batch: Batch, settings: Settings) -> Tensor:
    """Representation misdirection: mean_b (1/n_b) sum_t (1/H) ||h_t - c u||^2, u a random unit vector of the seed.

    h are the outputs of decoder layer `layer` where the answer is predicted (kl_positions "all": at every token, as in
    the paper's long texts), c is `steering`. Every sequence weighs the same; published code divides each by the number
    of tokens of every other one as well, the same only for one sequence at a time or sequences of one length. It takes
    the positions of the labels themselves: `published_rows`. Source: arXiv 2403.03218; settings of OpenUnlearning.
    """
    rows = batch.rows("forget")
    activations = _activations(rows)
    target = settings.steering * direction(activations.shape[-1], settings.seed).to(activations.device)
    return _distance(batch, rows, target)


def adaptive_rmu(batch: Batch, settings: Settings) -> Tensor:
    """The same with a target as long as the frozen model's activations: c = steering ||h_ref,t||.

    So that the layer does not matter as much. Source: arXiv 2408.06223, whose factor is 5.
    """
    rows = batch.rows("forget")
    before = require(rows.ref_activations, "frozen activations").float()
    length = before.norm(dim=-1, keepdim=True)
    return _distance(batch, rows, settings.steering * length * direction(before.shape[-1], settings.seed).to(length))


def check(settings: Settings, sizes: Sizes) -> str:
    if settings.layer is None or settings.layer < sizes.num_layers:
        return ""
    return f"--layer: the model has decoder layers 0 to {sizes.num_layers - 1}, got {settings.layer}"


def direction(size: int, seed: int) -> Tensor:
    """(H,) float32 of length 1, from uniform numbers between 0 and 1, as published code draws it; a seed gives one."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def _activations(rows: Rows) -> Tensor:
    return require(rows.activations, "activations").float()


def _distance(batch: Batch, rows: Rows, target: Tensor) -> Tensor:
    return batch.sequence_mean(within_sequences((_activations(rows) - target).square().mean(-1), rows))


register_family(
    "rmu",
    "RMU",
    formula="mean_s (1/|y_s|) sum_t ||h_t - c u||^2 / H",
    paper="arXiv 2403.03218",
    loss=rmu,
    colour="#DDCC77",
    reads="activations",
    alone="activations",
    published_rows="label",
    check=check,
    aliases={"": ("RMU",)},
)
register_family(
    "adaptive_rmu",
    "Adaptive RMU",
    formula="mean_s (1/|y_s|) sum_t ||h_t - c ||h_ref,t|| u||^2 / H",
    paper="arXiv 2408.06223",
    loss=adaptive_rmu,
    colour="#CC6677",
    reads="activations",
    alone="activations",
    ref_activations=True,
    published_rows="label",
    check=check,
    defaults={"steering": 5.0},
)
