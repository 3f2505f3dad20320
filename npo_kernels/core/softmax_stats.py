"""Arithmetic on (N,) row vectors that both backends and the mode loops share.

A row is described by its target logit z_y, its anchor a (z_y, or higher after an overflow repair) and the sum of the
anchored exponentials over the other columns, s = sum_{v != y} exp(z_v - a):

    p_v = prob_scale exp(z_v - a)      prob_scale = 1 / (s + exp(z_y - a))
    logp = -log1p(s) at a = z_y        miss = 1 - p_y = s prob_scale

Nothing here cancels: 1 - p_y keeps its relative precision down to the smallest float, and so does logp near 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.core.lm_head import Head


@dataclass(frozen=True)
class Statistics:
    """What the forward knows of each row, (n,) float32 each. `anchor` is that of the stored exponentials."""

    target_logit: Tensor
    logp: Tensor
    miss: Tensor  # 1 - p_target
    anchor: Tensor
    prob_scale: Tensor  # what makes the stored exponentials probabilities


def concatenate(parts: list[Statistics]) -> Statistics:
    """Of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    return Statistics(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def anchor_headroom(dtype: torch.dtype) -> float:
    """How far (nats) a logit may rise above its row's anchor before the row is re-anchored.

    float32 and bfloat16 hold exp(40) = 2^58 with room for sums and products; float16 ends at exp(11.1). A power of
    two: a re-anchored row is mostly its largest exponential, which is then stored without a rounding error.
    """
    return (12 if dtype == torch.float16 else 58) * math.log(2)


def row_statistics(parts: Tensor, anchor: Tensor, target_logit: Tensor) -> Statistics:
    """From the partial sums of exponentials (blocks, n) and the anchor they were taken at."""
    s = parts.sum(0)
    below = target_logit - anchor
    total = s + below.exp()
    logp = torch.where(below < 0, below - total.log(), -s.log1p())
    return Statistics(target_logit, logp, s / total, anchor, 1 / total)


def gradient_coefficients(stats: Statistics, grad: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(row_coef, target_coef), (n,) float32 each, from grad = dL/dlogp of each row, such that for stored exponentials E

    dX_i = target_coef_i W[y_i] - row_coef_i sum_v E_iv W_v
    dW   = sum_i target_coef_i onehot(y_i) x_i^T - E^T (row_coef * X)
    """
    scaled = grad * head.logit_scale
    # where: a sequence whose weight has vanished contributes exactly 0, whatever its exponentials are
    row_coef = torch.where(grad == 0, 0.0, scaled * stats.prob_scale)
    target_coef = torch.where(grad == 0, 0.0, scaled * stats.miss)
    if head.softcap is not None:
        target_coef = target_coef * (1.0 - (stats.target_logit / head.softcap) ** 2)
    return row_coef, target_coef


@dataclass(frozen=True)
class Lowered:
    """One logit of each row that is lowered before the softmax: z_v - shift [v = target]."""

    target: Tensor  # (n,) int64
    shift: float

    def rows(self, rows: slice) -> "Lowered":
        """Of some of the rows."""
        return Lowered(self.target[rows], self.shift)

    def valid(self, vocab_size: int) -> Tensor:
        """(n,) bool whether there is such a logit."""
        return (self.target >= 0) & (self.target < vocab_size)


@dataclass(frozen=True)
class Normalizers:
    """Of the softmaxes of a model and a reference: p_v = exp(z_v - anchor) / total, anchor the row maximum; (n,) each.

    Anchor and log total are never added: their sum is known to 1e-7 of the logits' size only. The anchor may be any
    number near the maximum, so a lowered logit is exp((z_v - anchor) - shift), never exp((z_v - shift) - anchor), which
    would round at the size of the logits: q_target = exp((z_target - ref_anchor) - shift) / ref_total.
    """

    anchor: Tensor
    total: Tensor
    ref_anchor: Tensor
    ref_total: Tensor

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """anchor, 1/total, ref_anchor, 1/ref_total, and the shift log total - log ref_total, small where they agree."""
        shift = (self.total.double() / self.ref_total).log().float()
        return self.anchor, 1 / self.total, self.ref_anchor, 1 / self.ref_total, shift


@dataclass(frozen=True)
class Divergence:
    """KL of two softmaxes as the primitives take it: which of the two it is, and what its terms are formed with."""

    vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # `Normalizers.vectors`
    lowered: Lowered | None = None  # of the reference
    reverse: bool = False  # KL(model || reference)
    kl: Tensor | None = None  # (n,) of each row: the gradient of the reverse direction has it in every entry


def merge_sums(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(row maximum, total of exp(z - maximum)), (n,), from those of parts of the vocabulary (splits, n)."""
    anchor = maxima.amax(0)
    return anchor, (sums.double() * torch.exp(maxima - anchor)).sum(0).float()
