"""The unlearning objectives of the papers, on sequence log-probabilities: one table entry each, no logits.

A method is a term on the sequences to forget and, perhaps, one that keeps the rest. Sums over answer tokens and <eos>:
logp_s of a sequence, r_s = logp_s - ref_s its log-ratio against the cached reference; means of sequence losses are over
sequences, means of token losses over tokens.

    ga      mean_tok log p(forget)                        arXiv 2404.05868, eq. 2: minimised, it ascends the NLL
    idk     mean_tok -log p("I don't know" answers)        arXiv 2401.06121
    npo     (2/beta) mean_s softplus(beta r_s)             arXiv 2404.05868, eq. 3
    dpo     (1/beta) mean_s softplus(-beta (r_idk - r_s))  the IDK answer wins, the true one loses
    kto     (2/beta) mean_s softplus(beta r_s - z)         z = beta mean_s r_idk of the whole step, no gradient
    simnpo  (2/beta) mean_s softplus(-beta (-logp_s / |y_s| - gamma))       arXiv 2410.07163

    rt      + mean_tok -log p(retain)
    kl      + mean_pos KL(reference || model) on retain    answer positions, or all of them (`training.objective`)

`compat="npo-repo"` gives the numbers of the NPO paper's code where they differ from its text: DPO with 2/beta, KTO with
1 + and z not multiplied by beta, IDK+RT as one token mean over both kinds of rows, and, by `training.unlearn`, KL over
all positions and the same retain row and refusal for a forget row in every epoch. That code takes z over a micro-batch
and counts padding among the positions; here z is always the step's, and padding counts nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from npo_kernels.core.formulas import log_ratio, ratio_loss
from training.require import require

Compat = Literal["paper", "npo-repo"]
Positions = Literal["answer", "all"]


@dataclass(frozen=True)
class Settings:
    """Constants of a method; weights multiply its terms."""

    beta: float = 0.1
    gamma: float = 0.0
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    kl_positions: Positions = "answer"  # all: every one that is not padding
    compat: Compat = "paper"

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta: expected more than 0, got {self.beta}")
        if self.compat not in get_args(Compat):
            raise ValueError(f"compat: expected one of {get_args(Compat)}, got {self.compat!r}")
        if self.kl_positions not in ("answer", "all"):
            raise ValueError(f"kl_positions: expected 'answer' or 'all', got {self.kl_positions!r}")


class Sequences(NamedTuple):
    """Rows of one kind: (n,) each. `ref_logps` where the method compares with the reference."""

    logps: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        return self.logps - require(self.ref_logps, "reference log-probabilities")


class Batch(NamedTuple):
    """The rows of a step, in this order in the forward, and what means over the whole step divide by.

    The totals are those of the accumulated or distributed batch (divided by the number of processes, whose gradients
    are averaged); None: what is here.
    """

    forget: Sequences | None  # a method without a term on them has none
    idk: Sequences | None = None  # the same questions, answered "I don't know"
    retain: Sequences | None = None
    num_sequences: float | None = None  # of the forget rows
    num_tokens: dict[str, float] | None = None  # kind of rows -> scored tokens
    idk_ratio: Tensor | float | None = None  # mean log-ratio of the IDK answers, where they are only scored (KTO)

    def rows(self, kind: str) -> Sequences:
        return require(getattr(self, kind), f"{kind} rows")

    def tokens(self, kind: str) -> Tensor | float:
        return self.rows(kind).num_tokens.sum() if self.num_tokens is None else self.num_tokens[kind]

    def sequence_mean(self, losses: Tensor) -> Tensor:
        """Over the forget rows that have a scored token."""
        scored = self.rows("forget").num_tokens > 0
        return losses.where(scored, 0.0).sum() / (scored.sum() if self.num_sequences is None else self.num_sequences)

    def nll(self, kind: str) -> Tensor:
        """Mean over the scored tokens."""
        return -self.rows(kind).logps.sum() / self.tokens(kind)


def _ga(batch: Batch, settings: Settings) -> Tensor:
    return -batch.nll("forget")


def _idk(batch: Batch, settings: Settings) -> Tensor:
    return batch.nll("idk")


def _npo(batch: Batch, settings: Settings) -> Tensor:
    return batch.sequence_mean(ratio_loss(batch.rows("forget").ratio, settings.beta))


def _dpo(batch: Batch, settings: Settings) -> Tensor:
    factor = 1.0 if settings.compat == "npo-repo" else 0.5
    return factor * batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - batch.rows("idk").ratio, settings.beta))


def _kto(batch: Batch, settings: Settings) -> Tensor:
    beta, z = settings.beta, batch.idk_ratio
    if z is None:
        raise ValueError("expected the mean log-ratio of the IDK answers, got None")
    if settings.compat == "npo-repo":
        ones = batch.sequence_mean(torch.ones_like(batch.rows("forget").logps))  # this part's share of "1 +"
        return ones + batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - z / beta, beta))
    return batch.sequence_mean(ratio_loss(batch.rows("forget").ratio - z, beta))


def _simnpo(batch: Batch, settings: Settings) -> Tensor:
    logps, num_tokens, _ = batch.rows("forget")
    offset = torch.full_like(logps, -settings.gamma)
    return batch.sequence_mean(ratio_loss(log_ratio(logps, num_tokens, offset, True), settings.beta))


@dataclass(frozen=True)
class Method:
    """A method by its terms, and what they need."""

    label: str
    forget: Callable[[Batch, Settings], Tensor]
    keep: str | None = None  # "nll" | "kl": the term on the retain rows
    idk: str | None = None  # rows answered "I don't know": "learn" them, or "score" them without a gradient
    reference: bool = False  # cached log-probabilities
    beta: float = 0.1  # what the paper uses
    forget_weight: float = 1.0  # with it

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows of the forward with gradients, in order; those of a KL term have their own."""
        kinds = () if self.forget is _idk else ("forget",)
        return kinds + ("idk",) * (self.idk == "learn") + ("retain",) * (self.keep == "nll")

    def loss(self, batch: Batch, settings: Settings) -> Tensor:
        """All but the KL term, which needs the reference's hidden states (`training.objective`)."""
        if self.forget is _idk and self.keep == "nll" and settings.compat == "npo-repo":
            tokens = batch.tokens("idk") + batch.tokens("retain")
            forget, keep = settings.forget_weight, settings.retain_weight
            return -(forget * batch.rows("idk").logps.sum() + keep * batch.rows("retain").logps.sum()) / tokens
        loss = settings.forget_weight * self.forget(batch, settings)
        return loss + settings.retain_weight * batch.nll("retain") if self.keep == "nll" else loss


METHODS = {
    "ga": Method("GA", _ga),
    "ga_rt": Method("GA+RT", _ga, "nll"),
    "ga_kl": Method("GA+KL", _ga, "kl"),
    "idk_rt": Method("IDK+RT", _idk, "nll", "learn"),
    "dpo": Method("DPO", _dpo, None, "learn", True),
    "dpo_rt": Method("DPO+RT", _dpo, "nll", "learn", True),
    "dpo_kl": Method("DPO+KL", _dpo, "kl", "learn", True),
    "kto": Method("KTO", _kto, None, "score", True),
    "kto_rt": Method("KTO+RT", _kto, "nll", "score", True),
    "kto_kl": Method("KTO+KL", _kto, "kl", "score", True),
    "npo": Method("NPO", _npo, reference=True),
    "npo_rt": Method("NPO+RT", _npo, "nll", reference=True),
    "npo_kl": Method("NPO+KL", _npo, "kl", reference=True),
    "simnpo": Method("SimNPO", _simnpo, None, beta=4.5),
    "simnpo_rt": Method("SimNPO+RT", _simnpo, "nll", beta=4.5, forget_weight=0.125),
}
