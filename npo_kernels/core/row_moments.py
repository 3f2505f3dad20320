"""Statistics of the next-token distribution of each row and their gradients: logp, entropy, max, mean and variance.

With logits z, p = softmax(z), zbar = sum_v p_v z_v and c_v = z_v - zbar (= log p_v - sum p log p),

    logp     log p_y                              d/dz_v = [v = y] - p_v
    entropy  - sum_v p_v log p_v                  d/dz_v = - p_v c_v
    max      max_v z_v                            d/dz_v = [v = argmax]           (the first, where there are several)
    mean     sum_v z_v / V                        d/dz_v = 1 / V
    var      sum_v p_v (log p_v)^2 - entropy^2    d/dz_v = p_v (c_v^2 + 2 c_v - var)

So the gradient of any combination has the same form in all columns except two, and the backward stores it in a slab:

    p_v (alpha + beta c_v + gamma c_v^2) + delta

The exceptions are the target and the argmax, the largest entries of most rows. Their terms are added separately, in
float32.

The forward sums over parts of the vocabulary, each about its own maximum and without the target, and merges the parts
in float64 (`join`). This keeps the digits of small quantities: 1 - p_y, and the entropy of a confident model.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels.core.lm_head import Head

NAMES = ("logp", "entropy", "max_logit", "mean_logit", "var_logp")
WITH_ARGMAX = (*NAMES, "argmax")  # argmax has no gradient


class Moments(NamedTuple):
    """Moments of parts of the vocabulary, (parts, n) each, with e_v = exp(z_v - maximum) of the part.

    total, first and second leave out the target. If all logits of a part are -inf, they are 0.
    """

    maximum: Tensor  # over all logits, including the target
    argmax: Tensor  # int64, the first column with the maximum, in columns of the head
    total: Tensor  # sum e_v
    first: Tensor  # sum e_v (z_v - maximum)
    second: Tensor  # sum e_v (z_v - maximum)^2
    logits: Tensor  # sum z_v, including the target


def join(parts: Moments) -> Moments:
    """Merge the moments of all parts: (n,) float64 each, argmax int64."""
    maximum, part = parts.maximum.max(0)
    shift = parts.maximum.double() - maximum.double()
    factor = shift.exp()
    shift = torch.where(factor == 0, 0.0, shift)
    total, first, second = parts.total.double(), parts.first.double(), parts.second.double()
    return Moments(
        maximum.double(),
        parts.argmax.gather(0, part.unsqueeze(0)).squeeze(0),
        (factor * total).sum(0),
        (factor * (first + shift * total)).sum(0),
        (factor * (second + shift * (2 * first + shift * total))).sum(0),
        parts.logits.double().sum(0),
    )


class RowMoments(NamedTuple):
    """Row vectors (n,) that the backward needs, float32 except argmax."""

    target_logit: Tensor
    anchor: Tensor  # the maximum
    prob_scale: Tensor  # p_v = prob_scale exp(z_v - anchor)
    center: Tensor  # zbar - anchor
    miss: Tensor  # 1 - p_y
    variance: Tensor
    argmax: Tensor  # int64


def statistics(whole: Moments, target_logit: Tensor, vocab_size: int) -> tuple[Tensor, RowMoments]:
    """(values (5, n) float32 in the order of NAMES, row vectors for the backward).

    A row whose target_logit is NaN gets NaN for all values.
    """
    z = target_logit.double()
    below = z - whole.maximum
    e = below.exp()
    norm = whole.total + e
    likely = whole.total <= e  # p_y >= 1/2: compute relative to the target, otherwise relative to the maximum
    from_target = whole.first - torch.where(whole.total == 0, 0.0, below * whole.total)
    center = (whole.first + torch.where(e == 0, 0.0, below * e)) / norm
    odds = whole.total / e
    logp = torch.where(likely, -odds.log1p(), below - norm.log())
    entropy = torch.where(likely, odds.log1p() - from_target / norm, norm.log() - center)
    square_about_target = whole.second - torch.where(whole.total == 0, 0.0, below * (whole.first + from_target))
    square = whole.second + torch.where(e == 0, 0.0, below * below * e)
    variance = torch.where(
        likely, square_about_target / norm - (from_target / norm).square(), square / norm - center.square()
    ).clamp(min=0)
    values = torch.stack((logp, entropy, whole.maximum, whole.logits / vocab_size, variance))
    values = torch.where(z.isnan(), torch.nan, values).float()
    rows = target_logit, whole.maximum, 1 / norm, center, whole.total / norm, variance
    return values, RowMoments._make([*(row.float() for row in rows), whole.argmax])


class GradientRows(NamedTuple):
    """Row vectors (n,) that define a gradient slab, float32 except argmax:

        slab_v = exp(z_v - anchor) (constant + linear c_v + square c_v^2) + flat,     c_v = z_v - anchor - center

    times the derivative of the softcap. The slab is 0 at the target and at the argmax.
    """

    anchor: Tensor
    center: Tensor
    constant: Tensor
    linear: Tensor
    square: Tensor
    flat: Tensor
    argmax: Tensor  # int64, in columns of the head; negative if it is in another rank's shard


class Coefficients(NamedTuple):
    """Coefficients (n,) float32 of the slab, the target and the argmax in the gradient with respect to x @ weight.T:

        -row * slab + target * onehot(y) + peak * onehot(argmax)

    `peak` is 0 where the target is the argmax.
    """

    row: Tensor
    target: Tensor
    peak: Tensor


def gradient_rows(
    rows: RowMoments,  # argmax in columns of the head
    upstream: Tensor,  # (5, n)
    target: Tensor,  # (n,)
    head: Head,
    vocab_size: int,
) -> tuple[GradientRows, Coefficients]:
    """The slab and its coefficients from the upstream gradients of the values.

    The coefficients inside the slab are normalised to size 1, whatever the loss is divided by, so that 16 bits suffice.
    """
    logp, entropy, maximum, mean, variance = upstream.double()
    constant = -logp - variance * rows.variance
    linear, square, flat = 2 * variance - entropy, variance, mean / vocab_size
    unit = torch.stack((constant, linear, square, flat)).abs().amax(0)
    below = rows.target_logit.double() - rows.anchor
    p, c = below.exp() * rows.prob_scale, below - rows.center
    about = torch.where(p == 0, 0.0, p * (-variance * rows.variance + linear * c + square * c * c))
    c = -rows.center.double()
    at_argmax = rows.prob_scale * (constant + linear * c + square * c * c) + flat + maximum
    same = (rows.argmax == target) & (target >= 0)
    target_coef = head.logit_scale * (logp * rows.miss + about + flat + torch.where(same, maximum, 0.0))
    peak_coef = head.logit_scale * torch.where(same, 0.0, at_argmax)
    if head.softcap is not None:
        target_coef = target_coef * (1.0 - (rows.target_logit.double() / head.softcap) ** 2)
        peak_coef = peak_coef * (1.0 - (rows.anchor.double() / head.softcap) ** 2)
    per_unit = torch.where(unit == 0, 1.0, unit)
    curve = (rows.prob_scale * coef / per_unit for coef in (constant, linear, square))
    parts = rows.anchor, rows.center, *(coef.float() for coef in (*curve, flat / per_unit)), rows.argmax
    coefs = -head.logit_scale * unit, target_coef, peak_coef
    return GradientRows(*parts), Coefficients(*(coef.float() for coef in coefs))
