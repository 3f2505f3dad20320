"""The unlearning objectives of the papers, on sequence log-probabilities: one table entry each, no logits.

A method is a term on the sequences to forget and, perhaps, one that keeps the rest. Sums over answer tokens and <eos>:
logp_s of a sequence, r_s = logp_s - ref_s its log-ratio against the cached reference; means of sequence losses are over
sequences, means of token losses over tokens.

    ga      mean_tok log p(forget)                        arXiv 2404.05868, eq. 2: minimised, it ascends the NLL
    idk     mean_tok -log p("I don't know" answers)        arXiv 2401.06121
    npo     (2/beta) mean_s softplus(beta r_s)             arXiv 2404.05868, eq. 3
    dpo     (1/beta) mean_s softplus(-beta (r_idk - r_s))  the IDK answer wins, the true one loses
    kto     (2/beta) mean_s softplus(beta r_s - z)         z = beta mean_s r_idk, without a gradient
    simnpo  (2/beta) mean_s softplus(-beta (-logp_s / |y_s| - gamma))       arXiv 2410.07163

    rt      + mean_tok -log p(retain)
    kl      + mean_pos KL(reference || model) on retain    answer positions, or all of them (`fused_linear_kl`)

`compat="npo-repo"` gives the numbers of the NPO paper's code where they differ from its text: DPO with 2/beta, KTO with
1 + and z not multiplied by beta, IDK+RT as one token mean over both kinds of rows. As in that code, z is a mean over
the IDK rows of one forward: KTO of micro-batches is not KTO of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from npo_kernels import fused_linear_kl, fused_logprob_loss
from npo_kernels.formulas import log_ratio, ratio_loss

COMPAT = ("paper", "npo-repo")


@dataclass(frozen=True)
class Settings:
    """Constants of a method; weights multiply its terms."""

    beta: float = 0.1
    gamma: float = 0.0
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    kl_positions: str = "answer"  # or "all": every position that is not padding
    compat: str = "paper"

    def __post_init__(self):
        if self.compat not in COMPAT:
            raise ValueError(f"compat: expected one of {COMPAT}, got {self.compat!r}")
        if self.kl_positions not in ("answer", "all"):
            raise ValueError(f"kl_positions: expected 'answer' or 'all', got {self.kl_positions!r}")


class Sequences(NamedTuple):
    """Rows of one kind: (n,) each. `ref_logps` where the method compares with the reference."""

    logps: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        return self.logps - self.ref_logps


class Batch(NamedTuple):
    """The rows of a step, in this order in the forward, and what means over the whole step divide by.

    The totals are those of the accumulated or distributed batch (divided by the number of processes, whose gradients
    are averaged); None: what is here.
    """

    forget: Sequences
    idk: Sequences | None = None  # the same questions, answered "I don't know"
    retain: Sequences | None = None
    num_sequences: float | None = None  # of the forget rows
    num_tokens: dict[str, float] | None = None  # kind of rows -> scored tokens

    def tokens(self, kind: str) -> Tensor | float:
        return getattr(self, kind).num_tokens.sum() if self.num_tokens is None else self.num_tokens[kind]

    def sequence_mean(self, losses: Tensor) -> Tensor:
        return losses.sum() / (losses.shape[0] if self.num_sequences is None else self.num_sequences)

    def nll(self, kind: str) -> Tensor:
        """Mean over the scored tokens."""
        return -getattr(self, kind).logps.sum() / self.tokens(kind)


def _ga(batch: Batch, settings: Settings) -> Tensor:
    return -batch.nll("forget")


def _idk(batch: Batch, settings: Settings) -> Tensor:
    return batch.nll("idk")


def _npo(batch: Batch, settings: Settings) -> Tensor:
    return batch.sequence_mean(ratio_loss(batch.forget.ratio, settings.beta))


def _dpo(batch: Batch, settings: Settings) -> Tensor:
    factor = 1.0 if settings.compat == "npo-repo" else 0.5
    return factor * batch.sequence_mean(ratio_loss(batch.forget.ratio - batch.idk.ratio, settings.beta))


def _kto(batch: Batch, settings: Settings) -> Tensor:
    beta, constant = settings.beta, 1.0 if settings.compat == "npo-repo" else 0.0
    z = batch.idk.ratio.detach().mean() / (beta if settings.compat == "npo-repo" else 1.0)
    return constant + batch.sequence_mean(ratio_loss(batch.forget.ratio - z, beta))


def _simnpo(batch: Batch, settings: Settings) -> Tensor:
    logps, num_tokens, _ = batch.forget
    offset = torch.full_like(logps, -settings.gamma)
    return batch.sequence_mean(ratio_loss(log_ratio(logps, num_tokens, offset, True), settings.beta))


@dataclass(frozen=True)
class Method:
    """A method by its terms, and what they need."""

    label: str
    forget: Callable[[Batch, Settings], Tensor]
    keep: str | None = None  # "nll" | "kl": the term on the retain rows
    idk: bool = False  # rows answered "I don't know"
    reference: bool = False  # cached log-probabilities
    beta: float = 0.1  # what the paper uses

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows of a batch, in order."""
        kinds = () if self.forget is _idk else ("forget",)
        return kinds + ("idk",) * self.idk + ("retain",) * (self.keep == "nll")

    def loss(self, batch: Batch, settings: Settings) -> Tensor:
        """All but the KL term, which needs the reference's hidden states."""
        if self.forget is _idk and self.keep == "nll" and settings.compat == "npo-repo":
            tokens = batch.tokens("idk") + batch.tokens("retain")
            return -(batch.idk.logps.sum() + batch.retain.logps.sum()) / tokens
        loss = settings.forget_weight * self.forget(batch, settings)
        return loss + settings.retain_weight * batch.nll("retain") if self.keep == "nll" else loss


METHODS = {
    "ga": Method("GA", _ga),
    "ga_rt": Method("GA+RT", _ga, "nll"),
    "ga_kl": Method("GA+KL", _ga, "kl"),
    "idk_rt": Method("IDK+RT", _idk, "nll", idk=True),
    "dpo": Method("DPO", _dpo, None, True, True),
    "dpo_rt": Method("DPO+RT", _dpo, "nll", True, True),
    "dpo_kl": Method("DPO+KL", _dpo, "kl", True, True),
    "kto": Method("KTO", _kto, None, True, True),
    "kto_rt": Method("KTO+RT", _kto, "nll", True, True),
    "kto_kl": Method("KTO+KL", _kto, "kl", True, True),
    "npo": Method("NPO", _npo, None, False, True),
    "npo_rt": Method("NPO+RT", _npo, "nll", False, True),
    "npo_kl": Method("NPO+KL", _npo, "kl", False, True),
    "simnpo": Method("SimNPO", _simnpo, None, beta=4.5),
    "simnpo_rt": Method("SimNPO+RT", _simnpo, "nll", beta=4.5),
}


@dataclass(frozen=True)
class Reference:
    """The frozen model on the retain rows, for KL terms."""

    hidden: Tensor  # (R, S, H_ref), or (T, H_ref) packed
    weight: Tensor  # (V, H_ref)
    mask: Tensor  # (R, S) or (T,) bool: the positions that count
    bias: Tensor | None = None
    num_positions: float | None = None  # of the whole step; None: those of the mask


@dataclass(frozen=True)
class Objective:
    """A method as `model(..., fused_unlearning=objective)` takes it: all its rows in one call of the head.

    The rows of the batch are those of `method.kinds` in order, `num_rows` of each.
    """

    method: Method
    settings: Settings
    num_rows: dict[str, int]
    ref_logps: dict[str, Tensor]  # kind -> (n,) float32
    num_sequences: float | None = None
    num_tokens: dict[str, float] | None = None

    def __call__(self, hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        return fused_logprob_loss(hidden, lm_head_weight, labels, self.of_logps, **options)

    def of_logps(self, logps: Tensor, num_tokens: Tensor) -> Tensor:
        """The loss of the (B,) log-probabilities and token counts."""
        kinds = self.method.kinds
        sizes = [self.num_rows[kind] for kind in kinds]
        if sum(sizes) != logps.shape[0]:
            raise ValueError(f"{self.method.label}: expected rows {dict(zip(kinds, sizes, strict=True))}, "
                             f"got {logps.shape[0]} sequences")  # fmt: skip
        sides = {
            kind: Sequences(part, counts, self.ref_logps.get(kind))
            for kind, part, counts in zip(kinds, logps.split(sizes), num_tokens.split(sizes), strict=True)
        }
        return self.method.loss(
            Batch(**{"forget": None, **sides}, num_sequences=self.num_sequences, num_tokens=self.num_tokens),
            self.settings,
        )


def kl_to_reference(reference: Reference, weight: float = 1.0) -> Callable[..., Tensor]:
    """weight * mean KL(reference || model) over the mask, as `model(**retain, fused_unlearning=...)` takes it."""

    def term(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, *, bias=None, logit_scale=1.0, softcap=None, **_):
        kl = fused_linear_kl(
            hidden, lm_head_weight, reference.hidden, reference.weight, mask=reference.mask, reduction="sum",
            bias=bias, ref_bias=reference.bias, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
        total = reference.mask.sum().clamp(min=1) if reference.num_positions is None else reference.num_positions
        return weight * kl / total

    return term
