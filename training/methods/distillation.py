"""UNDIAL: the model learns from itself, with the answers made less likely."""

import math

import torch
from torch import Tensor

from npo_kernels import fused_linear_kl, token_statistics
from training.methods.base import register_family
from training.methods.rows import Batch, Head, Reference, Rows
from training.methods.settings import Settings
from training.require import require


def undial(batch: Batch, settings: Settings) -> Tensor:
    """Self-distillation: mean_t KL(softmax(z_ref - beta onehot_y) || p) over the scored tokens.

    z_ref are the logits of the frozen model, formed slice by slice from its last hidden states: those of the answers,
    cached once, or those of a frozen copy (`Settings.teacher`). The papers' cross-entropy is this plus the entropy of
    the teacher, a constant. `published_rows`: the cross-entropy over all positions of a padded micro-batch, where those
    without a label lower token V - 100, which is what the published code does with its -100.
    Source: arXiv 2402.10052; settings of OpenUnlearning.
    """
    rows = batch.rows("forget")
    head, teacher = require(rows.head, "the head"), require(rows.teacher, "the teacher's hidden states")
    kl = fused_linear_kl(
        require(rows.hidden, "hidden states"),
        head.weight,
        teacher.hidden,
        teacher.weight,
        labels=rows.targets,
        target_shift=settings.beta,
        reduction="sum",
        ref_bias=teacher.bias,
        **head.options,
    )
    if not settings.published_rows:
        return kl / batch.tokens("forget")
    count, n = len(teacher.hidden), len(rows.num_tokens)
    share = n / (n if batch.num_sequences is None else batch.num_sequences)
    return share * (kl + teacher_entropy(rows, head, teacher, settings.beta).sum()) / max(count, 1)


@torch.no_grad()
def teacher_entropy(rows: Rows, head: Head, teacher: Reference, shift: float) -> Tensor:
    """(T,) entropies of softmax(z_ref - shift onehot_y), from entropy and log-probability of softmax(z_ref).

    With p_y the teacher's probability of the label, Z = 1 - p_y (1 - e^-shift) and E the entropy before the shift:
    (E + p_y log p_y - p_y e^-shift (log p_y - shift)) / Z + log Z.
    """
    targets = require(rows.targets, "labels")
    ends = torch.tensor([0, len(targets)], dtype=torch.int32, device=targets.device)
    options = head.options | {"bias": teacher.bias}
    found = token_statistics(
        teacher.hidden, teacher.weight, targets, ["logp", "entropy"], shift=False, cu_seqlens=ends, **options
    )
    logp, entropy = found["logp"], found["entropy"]
    p, factor = logp.exp(), math.exp(-shift)
    mass = -torch.expm1(logp) + p * factor
    return (entropy + p * logp - p * factor * (logp - shift)) / mass + mass.log()


register_family(
    "undial",
    "UNDIAL",
    formula="mean_tok KL(softmax(z_ref - beta onehot_y) || p)",
    paper="arXiv 2402.10052",
    loss=undial,
    colour="#44AA99",
    reads="hidden",
    teacher=True,
    published_rows="every",
    defaults={"beta": 10.0},
    aliases={"": ("UNDIAL",)},
)
