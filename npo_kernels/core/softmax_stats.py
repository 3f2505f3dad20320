"""Arithmetic on (N,) row vectors, shared by both backends and the modes.

A row is described by its target logit z_y, its anchor a (z_y, or a larger value after an overflow repair) and the sum
of the anchored exponentials over the other columns, s = sum_{v != y} exp(z_v - a):

    p_v = prob_scale exp(z_v - a)      prob_scale = 1 / (s + exp(z_y - a))
    logp = -log1p(s) at a = z_y        miss = 1 - p_y = s prob_scale

There is no cancellation: 1 - p_y and logp near 0 keep their relative precision down to the smallest float.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.core.lm_head import Head


@dataclass(frozen=True)
class Statistics:
    """Statistics of each row from the forward, (n,) float32 each. `anchor` is that of the stored exponentials."""

    target_logit: Tensor
    logp: Tensor
    miss: Tensor  # 1 - p_target
    anchor: Tensor
    prob_scale: Tensor  # factor that turns the stored exponentials into probabilities


def concatenate(parts: list[Statistics]) -> Statistics:
    """Concatenate the statistics of consecutive rows."""
    if len(parts) == 1:
        return parts[0]
    return Statistics(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def anchor_headroom(dtype: torch.dtype) -> float:
    """How far (in nats) a logit may exceed the anchor of its row before the row is re-anchored.

    float32 and bfloat16 hold exp(40) = 2^58 with room for sums and products; float16 overflows at exp(11.1). The limit
    is the log of a power of two: a re-anchored row is dominated by its largest exponential, which is then a power of
    two and stored without rounding error.
    """
    return (12 if dtype == torch.float16 else 58) * math.log(2)


def row_statistics(parts: Tensor, anchor: Tensor, target_logit: Tensor) -> Statistics:
    """Statistics of each row from the partial sums (blocks, n) of the exponentials and their anchor."""
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
    # where: a sequence of weight 0 contributes exactly 0, even if its exponentials are not finite
    row_coef = torch.where(grad == 0, 0.0, scaled * stats.prob_scale)
    target_coef = torch.where(grad == 0, 0.0, scaled * stats.miss)
    if head.softcap is not None:
        target_coef = target_coef * (1.0 - (stats.target_logit / head.softcap) ** 2)
    return row_coef, target_coef


@dataclass(frozen=True)
class Lowered:
    """A shift that lowers one logit of each row before the softmax: z_v - shift [v = target]."""

    target: Tensor  # (n,) int64
    shift: float

    def rows(self, rows: slice) -> "Lowered":
        """The same for some of the rows."""
        return Lowered(self.target[rows], self.shift)

    def valid(self, vocab_size: int) -> Tensor:
        """(n,) bool, whether the target is in [0, V)."""
        return (self.target >= 0) & (self.target < vocab_size)


@dataclass(frozen=True)
class Normalizers:
    """Softmax normalizers of a model and a reference, (n,) each: p_v = exp(z_v - anchor) / total, anchor = row maximum.

    anchor and log total are never added: the sum would have an error of 1e-7 of the size of the logits. Any number near
    the maximum can serve as the anchor, so for a lowered logit q_target = exp((z_target - ref_anchor) - shift) /
    ref_total is used. exp((z_target - shift) - ref_anchor) would have a rounding error of the size of the logits.
    """

    anchor: Tensor
    total: Tensor
    ref_anchor: Tensor
    ref_total: Tensor

    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(anchor, 1/total, ref_anchor, 1/ref_total, log total - log ref_total); the last is small if they agree."""
        shift = (self.total.double() / self.ref_total).log().float()
        return self.anchor, 1 / self.total, self.ref_anchor, 1 / self.ref_total, shift


@dataclass(frozen=True)
class Divergence:
    """The KL divergence as an argument of the primitives: its direction and the row vectors of its terms."""

    vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # `Normalizers.vectors`
    lowered: Lowered | None = None  # the target shift of the reference
    reverse: bool = False  # KL(model || reference)
    kl: Tensor | None = None  # (n,) KL of each row, needed for the gradient of the reverse direction


def merge_sums(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(row maximum, sum of exp(z - maximum)), (n,) each, from those of parts of the vocabulary, (splits, n) each."""
    anchor = maxima.amax(0)
    return anchor, (sums.double() * torch.exp(maxima - anchor)).sum(0).float()
