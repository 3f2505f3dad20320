"""The loss formulas on (B,) vectors. Each formula is written here and nowhere else in Python.

The fused losses, the torch backend and the reference call these functions; the Triton epilogue
(`csrc_triton/sequence_epilogue.py`) is tested against them.

NPO and SimNPO are the same function of a per-sequence log-ratio r:

    loss_s = (2/beta) softplus(beta * r_s)      d loss_s / d r_s = weight_s = 2 sigmoid(beta * r_s)

    NPO     r_s = logp_s - ref_s                (arXiv 2404.05868, equation 3)
    SimNPO  r_s = logp_s / |y_s| + gamma        (arXiv 2410.07163; gamma is multiplied by beta, as in the paper's code)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratio(logps: Tensor, num_tokens: Tensor, offset: Tensor, length_normalized: bool) -> Tensor:
    """r_s = logp_s - offset_s (NPO: offset = ref_logps), or logp_s / |y_s| - offset_s (SimNPO: offset = -gamma).

    NaN where the offset is not finite: an infinite reference is a mistake that would otherwise give a loss of 0.
    """
    if length_normalized:
        logps = logps / num_tokens.clamp(min=1)
    return torch.where(offset.isinf(), torch.nan, logps - offset)


def ratio_loss(log_ratio: Tensor, beta: float) -> Tensor:
    """(2/beta) softplus(beta * r) = -(2/beta) logsigmoid(-beta * r); logsigmoid is accurate for every r."""
    return (-2.0 / beta) * F.logsigmoid(-beta * log_ratio)


def ratio_weight(log_ratio: Tensor, beta: float) -> Tensor:
    """d ratio_loss / d r = 2 sigmoid(beta * r): 1 at the reference, towards 0 as a sequence is forgotten."""
    return 2.0 * torch.sigmoid(beta * log_ratio)


def sequence_scale(
    num_tokens: Tensor,
    reduction: str,
    normalizer: Tensor | float | None,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(B,) factors c_s such that the reduced loss is sum_s c_s loss_s, in `dtype` (float64 for a float64 reference).

    c_s is 0 for a sequence without a scored token, else 1. "mean" divides by the number of sequences with a scored
    token, or by `normalizer` if given (the count over an accumulated or distributed batch). `weights` (B,) multiply the
    c_s. A normalizer that is not positive and finite makes every c_s NaN; a weight that is negative or not finite makes
    its own c_s NaN.
    """
    scored = (num_tokens > 0).to(dtype)
    scale = scored
    if reduction == "mean":
        if normalizer is None:
            normalizer = scored.sum().clamp(min=1)
        elif isinstance(normalizer, Tensor):
            normalizer = torch.where((normalizer > 0) & ~normalizer.isinf(), normalizer, torch.nan)
        scale = scored / normalizer
    if weights is not None:
        weights = torch.where((weights >= 0) & ~weights.isinf(), weights, torch.nan)
        # where, because the weight of a sequence without a scored token may be anything
        scale = torch.where(scored == 0, scale, scale * weights)
    return scale


def reduce(scale: Tensor, ratio: Tensor, logps: Tensor, beta: float) -> Tensor:
    """(B,) c_s loss_s(r_s). 0 where c_s is 0, even if the reference is not finite; NaN where logps is NaN."""
    left_out = (scale == 0) & ~logps.isnan()
    # mask the ratio too: in the backward, the derivative at a NaN times 0 would be NaN
    return torch.where(left_out, 0.0, scale * ratio_loss(torch.where(left_out, 0.0, ratio), beta))


@dataclass(frozen=True)
class RatioLoss:
    """NPO or SimNPO of B sequences, sum_s scale_s loss_s(r_s), with all constants."""

    offset: Tensor  # (B,) float32: ref_logps (NPO) or -gamma (SimNPO)
    scale: Tensor  # (B,) float32: c_s of `sequence_scale`
    num_tokens: Tensor  # (B,) int64
    beta: float
    length_normalized: bool  # True for SimNPO

    def value_and_grad(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """(scale_s loss_s (B,) by `reduce`, their gradient (B,) with respect to logps)."""
        ratio = log_ratio(logps, self.num_tokens, self.offset, self.length_normalized)
        grad = torch.where(self.scale == 0, 0.0, self.scale * ratio_weight(ratio, self.beta))
        if self.length_normalized:
            grad = grad / self.num_tokens.clamp(min=1)
        return reduce(self.scale, ratio, logps, self.beta), grad

    def sequences(self, first: int, last: int) -> "RatioLoss":
        """The same loss for the sequences [first, last)."""
        part = slice(first, last)
        return RatioLoss(self.offset[part], self.scale[part], self.num_tokens[part], self.beta, self.length_normalized)
