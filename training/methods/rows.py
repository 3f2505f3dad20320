"""The input of a method's loss: the rows of a batch by kind, and the denominators of means over the whole step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from training.require import require

Kind = Literal["forget", "idk", "alternate", "retain"]
"""Kinds of rows. idk: the questions to forget, answered "I don't know"; alternate: with another plausible answer."""


class Head(NamedTuple):
    """The output head: logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments for npo_kernels."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


class Reference(NamedTuple):
    """Hidden states and head of the frozen model, so that its logits are not formed either."""

    hidden: Tensor  # (..., H_ref)
    weight: Tensor  # (V, H_ref)
    bias: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """The n rows of one kind in a batch, T scored tokens in all, in the order of rows and positions.

    `num_tokens` is always set, the others depend on `Method.reads`. Summed log-probabilities are set for all methods
    except those on hidden states, logits and activations, which skip that product with the head.
    """

    num_tokens: Tensor  # (n,) int64
    summed: Tensor | None = None  # (n,) log-probabilities of the answers
    ref_logps: Tensor | None = None  # (n,) float32, where the method compares with the reference
    token_logps: Tensor | None = None  # token, statistics: (T,)
    ref_token_logps: Tensor | None = None  # token: (T,) float32, where the method compares with the reference
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # statistics: (T,) each of `Method.statistics`
    sequence: Tensor | None = None  # all but sequence: (T,) int64, the row of each of the T
    hidden: Tensor | None = None  # hidden, logits: (T, H), what the head sees where a token is scored
    targets: Tensor | None = None  # hidden, logits: (T,) int64, the scored tokens
    head: Head | None = None  # hidden
    teacher: Reference | None = None  # hidden: of the frozen model, for the same T
    logits: Tensor | None = None  # logits: (T, V)
    activations: Tensor | None = None  # activations: (T, H), output of the layer where a token counts
    ref_activations: Tensor | None = None  # activations: the frozen model's

    @property
    def logps(self) -> Tensor:
        """(n,) summed log-probabilities of the answers."""
        return require(self.summed, "log-probabilities of sequences, which this method does not read")

    @property
    def ratio(self) -> Tensor:
        """(n,) log-ratios against the reference."""
        return self.logps - require(self.ref_logps, "reference log-probabilities")

    @property
    def place(self) -> Tensor:
        """(T,) int64: the index of each token in its answer, from 0."""
        sequence = require(self.sequence, "tokens")
        first = self.num_tokens.cumsum(0) - self.num_tokens
        return torch.arange(len(sequence), device=sequence.device) - first[sequence]


class Batch(NamedTuple):
    """The rows of a micro-batch, and the denominators of means over the whole step.

    The totals are those of the accumulated or distributed batch, divided by the number of processes, as gradients are
    averaged over processes. None: the total of this micro-batch.
    """

    kinds: Mapping[str, Rows]
    num_sequences: float | None = None  # of the forget rows
    num_tokens: Mapping[str, float] | None = None  # kind of rows -> scored tokens
    idk_ratio: Tensor | float | None = None  # mean log-ratio of the IDK answers, where they are only scored (KTO)
    num_counted: float | None = None  # of the forget rows, scored tokens behind the first `Settings.skip_tokens`

    def rows(self, kind: Kind) -> Rows:
        return require(self.kinds.get(kind), f"{kind} rows")

    def tokens(self, kind: Kind) -> Tensor | float:
        return self.rows(kind).num_tokens.sum() if self.num_tokens is None else self.num_tokens[kind]

    def sequence_mean(self, losses: Tensor, kind: Kind = "forget") -> Tensor:
        """Mean of (n,) losses of a kind, over rows with a scored token. A step has equally many rows of each kind."""
        scored = self.rows(kind).num_tokens > 0
        return losses.where(scored, 0.0).sum() / (scored.sum() if self.num_sequences is None else self.num_sequences)

    def token_mean(self, losses: Tensor, kind: Kind = "forget") -> Tensor:
        """Mean of (T,) losses over the scored tokens."""
        return losses.sum() / self.tokens(kind)

    def nll(self, kind: Kind) -> Tensor:
        """Mean negative log-likelihood over the scored tokens."""
        return -self.rows(kind).logps.sum() / self.tokens(kind)

    def share(self, kind: Kind) -> Tensor:
        """This micro-batch's share of the scored tokens of the step, to scale constants in the loss."""
        return self.rows(kind).num_tokens.sum() / self.tokens(kind)


def within_sequences(values: Tensor, rows: Rows) -> Tensor:
    """(n,) means of (T,) values over the tokens of each row; 0 for a row without tokens."""
    sequence = require(rows.sequence, "tokens")
    counts = torch.bincount(sequence, minlength=len(rows.num_tokens)).clamp(min=1)
    return values.new_zeros(len(rows.num_tokens)).index_add(0, sequence, values) / counts
