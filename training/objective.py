"""Objectives as a model's forward takes them: `model(**rows, fused_unlearning=objective)`, and then forms no logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_linear_kl, fused_logprob_loss, fused_token_loss, sequence_logprobs
from training.data import IGNORE_INDEX
from training.methods import Batch, Method, Rows, Settings


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
    num_scored: Mapping[str, int] = field(default_factory=dict)  # kind -> scored tokens here, unless it reads sequences

    def __call__(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss, by the function of npo_kernels that gives the method what it reads."""
        if self.method.reads == "sequence":
            return fused_logprob_loss(hidden, lm_head_weight, labels, self.of_logps, **options)
        if self.method.reads == "token":
            return fused_token_loss(hidden, lm_head_weight, labels, self.of_token_logps, **options)
        return self.of_hidden(hidden, lm_head_weight, labels, **options)

    def of_logps(self, logps: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (B,) log-probabilities and token counts."""
        self._check(len(logps))
        return self._loss(logps, num_tokens)

    def of_token_logps(self, token_logps: Tensor, sequence: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (T,) log-probabilities of the scored tokens, of the rows `sequence`."""
        self._check(len(num_tokens))
        logps = token_logps.new_zeros(len(num_tokens)).index_add(0, sequence, token_logps)
        return self._loss(logps, num_tokens, sequence, token_logps=token_logps)

    def of_hidden(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        """The loss of the (T, H) hidden states where a token is scored; with logits for a method that reads them."""
        logps, num_tokens = sequence_logprobs(hidden, lm_head_weight, labels, **options)
        self._check(len(logps))
        hidden, targets, sequence = _scored(hidden, labels, options.get("cu_seqlens"))
        logits = None
        if self.method.reads == "logits":
            logits = torch.nn.functional.linear(hidden, lm_head_weight, options.get("bias")).float()
            logits = logits * options.get("logit_scale", 1.0)
            if cap := options.get("softcap"):
                logits = cap * torch.tanh(logits / cap)
        return self._loss(logps, num_tokens, sequence, hidden=hidden, targets=targets, logits=logits)

    def _check(self, rows: int) -> None:
        expected = {kind: self.num_rows[kind] for kind in self.method.kinds}
        if sum(expected.values()) != rows:
            raise ValueError(f"{self.method.label}: expected rows {expected}, got {rows} sequences")

    def _loss(
        self, logps: Tensor, num_tokens: Tensor, sequence: Tensor | None = None, **of_tokens: Tensor | None
    ) -> Tensor:
        """Rows of each kind cut from the batch: (B,) tensors by rows, those of (T, ...) by their tokens."""
        kinds: dict[str, Rows] = {}
        first = first_token = 0
        for kind in self.method.kinds:
            rows = slice(first, first := first + self.num_rows[kind])
            cut = {}
            if sequence is not None:
                tokens = slice(first_token, first_token := first_token + self.num_scored[kind])
                cut = {name: values[tokens] for name, values in of_tokens.items() if values is not None}
                cut["sequence"] = sequence[tokens] - rows.start
            kinds[kind] = Rows(logps[rows], num_tokens[rows], self.ref_logps.get(kind), **cut)
        batch = Batch(kinds, self.num_sequences, self.num_tokens, self.idk_ratio)
        return self.method.total(batch, self.settings)


def _scored(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """((T, H) hidden states, (T,) labels, (T,) rows) of the scored tokens: position t is scored on labels[t+1]."""
    if cu_seqlens is None:
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        return hidden[mask], labels.roll(-1, 1)[mask], mask.nonzero()[:, 0]
    lengths = cu_seqlens.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=labels.device), lengths)
    following = labels.roll(-1)
    mask = following != IGNORE_INDEX
    mask[cu_seqlens[1:].long() - 1] = False  # the last position of a sequence predicts nothing
    return hidden[mask], following[mask], row[mask]


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
