"""Arithmetic on (N,) row vectors that both backends and the mode loops share.

A row is described by its target logit z_y, its anchor a (z_y, or higher after an overflow repair) and the sum of the
anchored exponentials over the other columns, s = sum_{v != y} exp(z_v - a). With S = s exp(a - z_y):

    logp = -log1p(S)        miss = 1 - p_y = S / (1 + S)        p_v = exp(z_v - a) exp(a - z_y + logp)

Nothing here cancels: 1 - p_y keeps its relative precision down to the smallest float, and so does logp near 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from npo_kernels.head import Head


@dataclass(frozen=True)
class Statistics:
    """What the forward knows of each row, (n,) float32 each. `anchor` is that of the stored exponentials."""

    target_logit: Tensor
    logp: Tensor
    miss: Tensor  # 1 - p_target
    anchor: Tensor


def anchor_headroom(dtype: torch.dtype) -> float:
    """How far (nats) a logit may rise above its row's anchor before the row is re-anchored.

    float32 and bfloat16 hold exp(40) with room for sums and products; float16 ends at exp(11.1).
    """
    return 8.0 if dtype == torch.float16 else 40.0


def exact_anchor(target_logit: Tensor, logp: Tensor, dtype: torch.dtype) -> Tensor:
    """The anchor for a second pass over known rows: the log-sum-exp, so that E = p <= 1.

    In float16 small probabilities would be subnormal, so E = p exp(8) there, the same headroom used upwards.
    """
    lse = target_logit - logp
    return lse - anchor_headroom(dtype) if dtype == torch.float16 else lse


def row_statistics(sums: Tensor, anchor: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, miss) from the sums of exponentials and the anchor they were taken at."""
    gap = anchor - target_logit
    log_odds = gap + sums.log()  # log S, finite even where S itself is not
    repaired = gap > 0
    logp = torch.where(repaired, -(log_odds.clamp(min=0) + torch.log1p(torch.exp(-log_odds.abs()))), -torch.log1p(sums))
    miss = torch.where(repaired, torch.sigmoid(log_odds), sums / (1 + sums))
    return logp, miss


def gradient_coefficients(stats: Statistics, grad: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(row_coef, target_coef), (n,) float32 each, from grad = dL/dlogp of each row, such that for stored exponentials E

    dX_i = target_coef_i W[y_i] - row_coef_i sum_v E_iv W_v
    dW   = sum_i target_coef_i onehot(y_i) x_i^T - E^T (row_coef * X)
    """
    scaled = grad * head.logit_scale
    # where: a sequence whose weight has vanished contributes exactly 0, whatever its exponentials are
    row_coef = torch.where(grad == 0, 0.0, scaled * torch.exp(stats.anchor - stats.target_logit + stats.logp))
    target_coef = torch.where(grad == 0, 0.0, scaled * stats.miss)
    if head.softcap is not None:
        target_coef = target_coef * (1.0 - (stats.target_logit / head.softcap) ** 2)
    return row_coef, target_coef
