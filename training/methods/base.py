"""What a method of unlearning is: one record in a registry, and the rows that its loss is given.

A method is a term that forgets and, perhaps, one that keeps the rest:

    loss = forget_weight * term(rows) + retain_weight * (NLL of the retain rows | KL to the reference on them)

A new method is one record (`register`) with one function. Commands, figures, reports, help texts and the tables of the
documentation take it from `METHODS`; the engine calls its `loss` with rows of the sort that it `reads`.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from training.require import require

Kind = Literal["forget", "idk", "retain"]  # of rows; idk: the questions to forget, answered "I don't know"
Retain = Literal["nll", "kl"]
Reads = Literal["sequence", "token", "hidden", "logits"]
Compat = Literal["paper", "npo-repo"]
Positions = Literal["answer", "all"]

LINE_STYLES: dict[str | None, str] = {None: "--", "nll": "-", "kl": ":"}  # of the curves, by the retain term


@dataclass(frozen=True)
class Settings:
    """Constants of a run; the weights multiply the two terms of the loss."""

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
        if self.kl_positions not in get_args(Positions):
            raise ValueError(f"kl_positions: expected 'answer' or 'all', got {self.kl_positions!r}")


@dataclass(frozen=True)
class Rows:
    """The n rows of one kind in a batch, T scored tokens in all, in the order of rows and positions.

    `logps` and `num_tokens` are there whatever a method reads; the others where it reads them.
    """

    logps: Tensor  # (n,) summed log-probabilities of the answers
    num_tokens: Tensor  # (n,) int64
    ref_logps: Tensor | None = None  # (n,) float32, where the method compares with the reference
    token_logps: Tensor | None = None  # token: (T,)
    sequence: Tensor | None = None  # token, hidden, logits: (T,) int64, the row of each scored token
    hidden: Tensor | None = None  # hidden, logits: (T, H), what the head sees where a token is scored
    targets: Tensor | None = None  # hidden, logits: (T,) int64, the scored tokens
    logits: Tensor | None = None  # logits: (T, V)

    @property
    def ratio(self) -> Tensor:
        """(n,) log-ratios against the reference."""
        return self.logps - require(self.ref_logps, "reference log-probabilities")


class Batch(NamedTuple):
    """The rows of a step that are here, and what means over the whole step divide by.

    The totals are those of the accumulated or distributed batch, divided by the number of processes, whose gradients
    are averaged; None: what is here.
    """

    kinds: Mapping[str, Rows]
    num_sequences: float | None = None  # of the forget rows
    num_tokens: Mapping[str, float] | None = None  # kind of rows -> scored tokens
    idk_ratio: Tensor | float | None = None  # mean log-ratio of the IDK answers, where they are only scored (KTO)

    def rows(self, kind: Kind) -> Rows:
        return require(self.kinds.get(kind), f"{kind} rows")

    def tokens(self, kind: Kind) -> Tensor | float:
        return self.rows(kind).num_tokens.sum() if self.num_tokens is None else self.num_tokens[kind]

    def sequence_mean(self, losses: Tensor) -> Tensor:
        """Of (n,) losses of the forget rows, over those that have a scored token."""
        scored = self.rows("forget").num_tokens > 0
        return losses.where(scored, 0.0).sum() / (scored.sum() if self.num_sequences is None else self.num_sequences)

    def token_mean(self, losses: Tensor, kind: Kind = "forget") -> Tensor:
        """Of (T,) losses of the scored tokens."""
        return losses.sum() / self.tokens(kind)

    def nll(self, kind: Kind) -> Tensor:
        """Mean over the scored tokens."""
        return -self.rows(kind).logps.sum() / self.tokens(kind)


Loss = Callable[[Batch, Settings], Tensor]


@dataclass(frozen=True)
class Method:
    """One objective: what it is called, what it needs, and its loss.

    Attributes:
        name: as commands take it, `npo_rt`.
        label: as figures and reports show it, `NPO+RT`.
        formula: the term that forgets, as a line of text.
        paper: where it is from.
        loss: (batch, settings) -> the term that forgets, a scalar.
        colour: of its curves; methods with the same forget term share one and differ in their line style.
        rows: kinds of rows that the forget term takes a gradient through.
        scored: kinds that are only scored, without a gradient, before the step (`Batch.idk_ratio`).
        retain: the term on the retain rows: their NLL, the KL divergence from the reference model, or none.
        reads: what the loss is a function of. sequence: `Rows.logps`; token: `Rows.token_logps`; hidden: hidden states
            where a token is scored; logits: logits there, which then exist (for experiments, not for speed).
        reference: whether the cached reference log-probabilities of the rows are needed.
        defaults: settings that the paper uses, where they differ from those of `Settings`.
        aliases: other names that commands take.
    """

    name: str
    label: str
    formula: str
    paper: str
    loss: Loss
    colour: str
    rows: tuple[Kind, ...] = ("forget",)
    scored: tuple[Kind, ...] = ()
    retain: Retain | None = None
    reads: Reads = "sequence"
    reference: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows of the forward with gradients, in order; those of a KL term have their own forward."""
        return self.rows + (("retain",) if self.retain == "nll" else ())

    @property
    def needs(self) -> tuple[str, ...]:
        """All kinds of rows that a run has to have."""
        kinds: tuple[Kind, ...] = ("forget", "idk", "retain")
        return tuple(k for k in kinds if k in self.rows + self.scored or (k == "retain" and self.retain))

    @property
    def line_style(self) -> str:
        return LINE_STYLES[self.retain]

    def settings(self, **given: float | str | None) -> Settings:
        """Those given, then the paper's, then the defaults. None: not given."""
        return Settings(**{**self.defaults, **{k: v for k, v in given.items() if v is not None}})  # type: ignore[arg-type]

    def total(self, batch: Batch, settings: Settings) -> Tensor:
        """All but a KL term, which needs the reference's hidden states (`training.objective`)."""
        if settings.compat == "npo-repo" and self.rows == ("idk",) and self.retain == "nll":
            # the NPO paper's code takes one token mean over both kinds of rows
            forget, keep = settings.forget_weight, settings.retain_weight
            logps = forget * batch.rows("idk").logps.sum() + keep * batch.rows("retain").logps.sum()
            return -logps / (batch.tokens("idk") + batch.tokens("retain"))
        loss = settings.forget_weight * self.loss(batch, settings)
        return loss + settings.retain_weight * batch.nll("retain") if self.retain == "nll" else loss


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry. ValueError where its name or an alias is taken."""
    taken = {name for m in METHODS.values() for name in (m.name, *m.aliases)} & {method.name, *method.aliases}
    if taken:
        raise ValueError(f"method {method.name}: {', '.join(sorted(taken))} is there already; choose another name")
    if method.reads not in get_args(Reads):
        raise ValueError(f"method {method.name}: reads: expected one of {get_args(Reads)}, got {method.reads!r}")
    METHODS[method.name] = method
    return method


def register_family(name: str, label: str, *, rt: Mapping[str, float] | None = None, **record) -> None:
    """Three methods: `name` alone, `name_rt` with the NLL of the retain rows, `name_kl` with the KL divergence.

    `rt`: further defaults where there is a retain term.
    """
    defaults, aliases = record.pop("defaults", {}), record.pop("aliases", {})
    for suffix, retain in (("", None), ("_rt", "nll"), ("_kl", "kl")):
        register(
            Method(
                name=name + suffix,
                label=label + suffix.upper().replace("_", "+"),
                retain=retain,  # type: ignore[arg-type]  # mypy widens the literals of the tuple
                defaults={**defaults, **(rt or {})} if retain else defaults,
                aliases=aliases.get(suffix, ()),
                **record,
            )
        )


def method_named(name: str) -> Method:
    """The method of that name or alias. ValueError with the nearest names where there is none."""
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    near = difflib.get_close_matches(name, METHODS, n=3) or list(METHODS)
    raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}; did you mean {near[0]}?")


def step_mean(batch: Batch, value: float) -> Tensor:
    """`value` as a mean over the step's forget rows, of which this part contributes its share."""
    return batch.sequence_mean(torch.full_like(batch.rows("forget").logps, value))
