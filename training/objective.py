"""Objectives as a model's forward takes them: `model(**rows, fused_unlearning=objective)`, and then forms no logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_linear_kl, fused_logprob_loss
from training.methods import Batch, Method, Sequences, Settings


def token_nll(num_tokens: float | None = None) -> Callable[..., Tensor]:
    """Cross-entropy over the scored tokens: -sum_s logp_s / sum_s |y_s|, or divided by `num_tokens`."""

    def of_logps(logps: Tensor, counts: Tensor) -> Tensor:
        return -logps.sum() / (counts.sum() if num_tokens is None else num_tokens)

    def objective(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        return fused_logprob_loss(hidden, lm_head_weight, labels, of_logps, **options)

    return objective


@dataclass(frozen=True)
class Objective:
    """A method on rows of the kinds `method.kinds`, in that order, `num_rows` of each: all in one call of the head."""

    method: Method
    settings: Settings
    num_rows: dict[str, int]
    ref_logps: dict[str, Tensor]  # kind -> (n,) float32
    num_sequences: float | None = None  # of the whole step, and so below: see `Batch`
    num_tokens: dict[str, float] | None = None
    idk_ratio: Tensor | float | None = None

    def __call__(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        return fused_logprob_loss(hidden, lm_head_weight, labels, self.of_logps, **options)

    def of_logps(self, logps: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (B,) log-probabilities and token counts."""
        kinds = self.method.kinds
        sizes = [self.num_rows[kind] for kind in kinds]
        if sum(sizes) != logps.shape[0]:
            expected = dict(zip(kinds, sizes, strict=True))
            raise ValueError(f"{self.method.label}: expected rows {expected}, got {logps.shape[0]} sequences")
        sides = {
            kind: Sequences(part, counts, self.ref_logps.get(kind))
            for kind, part, counts in zip(kinds, logps.split(sizes), num_tokens.split(sizes), strict=True)
        }
        batch = Batch(
            sides.get("forget"),
            sides.get("idk"),
            sides.get("retain"),
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            idk_ratio=self.idk_ratio,
        )
        return self.method.loss(batch, self.settings)


@dataclass(frozen=True)
class Reference:
    """What the reference model gives to its head on the rows of a KL term: the term forms no logits of it, either."""

    hidden: Tensor  # (R, S, H_ref), or (T, H_ref) packed
    weight: Tensor  # (V, H_ref)
    bias: Tensor | None = None


@torch.no_grad()
def reference_of(model: PreTrainedModel, rows: dict[str, Tensor]) -> Reference:
    """One forward of the frozen model, which has a fused head as well."""

    def taken(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **_: Any):
        return hidden, Reference(hidden, lm_head_weight, bias)  # where a loss and its statistics would be

    return model(**rows, fused_unlearning=taken).stats


def kl_to_reference(
    reference: Reference, mask: Tensor, weight: float = 1.0, num_positions: float | None = None
) -> Callable[..., Tensor]:
    """weight * mean KL(reference || model) over the mask, (R, S) or (T,) bool; `num_positions` replaces its count."""

    def objective(
        hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias=None, logit_scale=1.0, softcap=None, **_: Any
    ) -> Tensor:
        kl = fused_linear_kl(
            hidden,
            lm_head_weight,
            reference.hidden,
            reference.weight,
            mask=mask,
            reduction="sum",
            bias=bias,
            ref_bias=reference.bias,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        return weight * kl / (mask.sum().clamp(min=1) if num_positions is None else num_positions)

    return objective
