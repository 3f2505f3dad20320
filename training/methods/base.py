"""The registry of unlearning methods. A method is one record.

A method has a forget term and, optionally, a retain term:

    loss = forget_weight * term(rows) + retain_weight * (NLL of the retain rows, or KL to the reference on them)

To add a method, register one record with one function (`register`). Commands, figures, reports, help texts and the
tables of the documentation read `METHODS`. The engine calls `loss` with what the method `reads`.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from training.methods.rows import Batch, Kind, within_sequences
from training.methods.settings import Settings
from training.require import require

Retain = Literal["nll", "kl", "activations"]
Reads = Literal["sequence", "token", "statistics", "hidden", "logits", "activations"]

LINE_STYLES: dict[str | None, str] = {None: "--", "nll": "-", "kl": ":", "activations": "-."}  # by the retain term
PRODUCTS: dict[Reads, int] = {"sequence": 3, "token": 3, "statistics": 4, "hidden": 6, "logits": 3, "activations": 0}
SUFFIXES: dict[str, Retain | None] = {"": None, "_rt": "nll", "_kl": "kl"}

Loss = Callable[[Batch, Settings], Tensor]
Observe = Callable[[str, Tensor, float], None]  # name of a term, the term without its weight, its weight


class Sizes(NamedTuple):
    """Sizes of a run that the settings must fit."""

    vocab_size: int
    num_layers: int
    longest_answer: int  # scored tokens of a forget row


@dataclass(frozen=True)
class Method:
    """One objective: its names, what it needs, and its loss.

    Attributes:
        name: for commands, `npo_rt`.
        label: for figures and reports, `NPO+RT`.
        formula: the forget term, as a line of text.
        paper: its source.
        loss: (batch, settings) -> the forget term, a scalar.
        colour: of its curves; methods with the same forget term share one and differ in their line style.
        family: name of the forget term; methods that differ only in the retain term share it.
        rows: kinds of rows that the forget term has a gradient for.
        scored: kinds that are only scored, without a gradient, before the step (`Batch.idk_ratio`).
        retain: the term on the retain rows: their NLL, the KL divergence from the reference model, the distance of
            activations from its activations (of methods that read these), or none.
        reads: what the loss is a function of. sequence: `Rows.logps`; token: `Rows.token_logps`; statistics:
            `Rows.statistics`; hidden: hidden states where a token is scored, and the head; logits: logits there, which
            then exist (for experiments, not for speed); activations: the output of a layer.
        statistics: names for `npo_kernels.token_statistics`, beside "logp".
        reference: whether the cached reference log-probabilities of the rows are needed, those of tokens for a method
            that reads tokens.
        teacher: whether the frozen model's last hidden states on the forget rows are needed (`Rows.teacher`).
        ref_activations: whether the frozen model's activations on the forget rows are needed.
        dual: whether `retain_weight` is updated during training (`training.dual`).
        published_rows: the positions that OpenUnlearning's code takes where they are not the scored ones: "label", a
            token's own position and not the one before, "every", padding included. `Settings.published_rows` asks for
            them.
        row_weight: (batch, settings) -> (n,) factor of the gradient of each forget row, for trackers. None: there is
            no such factor.
        products: with the head, forward and backward together, on the forget rows. None: by what is read.
        check: (settings, sizes) -> an error message if the method cannot run with them, else "".
        reconstructed: the source does not state the formula completely; the loss says what was filled in.
        defaults: settings that the paper uses, where they differ from those of `Settings`.
        aliases: other names that commands accept.
    """

    name: str
    label: str
    formula: str
    paper: str
    loss: Loss
    colour: str
    family: str = ""
    rows: tuple[Kind, ...] = ("forget",)
    scored: tuple[Kind, ...] = ()
    retain: Retain | None = None
    reads: Reads = "sequence"
    statistics: tuple[str, ...] = ()
    reference: bool = False
    teacher: bool = False
    ref_activations: bool = False
    dual: bool = False
    published_rows: Literal["label", "every"] | None = None
    row_weight: Loss | None = None
    products: int | None = None
    check: Callable[[Settings, Sizes], str] = lambda settings, sizes: ""
    reconstructed: bool = False
    defaults: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rows in the forward with gradients, in order. The rows of a KL term have their own forward."""
        return self.rows + (("retain",) if self.retain in ("nll", "activations") else ())

    @property
    def needs(self) -> tuple[str, ...]:
        """All kinds of rows that a run needs."""
        return tuple(k for k in get_args(Kind) if k in self.rows + self.scored or (k == "retain" and self.retain))

    def needs_frozen_model(self, settings: Settings) -> bool:
        """Whether the frozen reference model runs in every step."""
        return self.retain in ("kl", "activations") or self.ref_activations or self.taught_by_model(settings)

    def taught_by_model(self, settings: Settings) -> bool:
        """Whether the teacher's hidden states are computed in every step instead of cached."""
        return self.teacher and (settings.teacher == "model" or settings.published_rows)

    @property
    def line_style(self) -> str:
        return LINE_STYLES[self.retain]

    @property
    def source(self) -> str:
        return f"{self.paper}, reconstructed" if self.reconstructed else self.paper

    @property
    def cost(self) -> str:
        """The cost in words: products with the head, and what is kept of the reference."""
        products = PRODUCTS[self.reads] if self.products is None else self.products
        kept = "one number a token" if self.reads == "token" else "one number a row"
        held = [kept] if self.reference else ["hidden states of the answers"] if self.teacher else []
        if self.retain in ("kl", "activations") or self.ref_activations:
            held.append("frozen model")
        together = 4 if self.reads == "statistics" else 3  # of the retain rows, which go into the same call
        retain = {"nll": f" + {together} on retain rows", "kl": " + 6 on retain rows"}.get(self.retain or "", "")
        forms = ", forms logits" if self.reads == "logits" else ""
        return f"{products} products{retain}{forms}; {', '.join(held) or 'no reference'}"

    def settings(self, **given: float | str | None) -> Settings:
        """The settings given, then the paper's, then the defaults. None: not given."""
        return Settings(**{**self.defaults, **{k: v for k, v in given.items() if v is not None}})  # type: ignore[arg-type]

    def total(self, batch: Batch, settings: Settings, observe: Observe | None = None) -> Tensor:
        """All but a KL term, which needs the reference's hidden states (`training.objective`).

        `observe` is called with each term and its weight.
        """
        if settings.compat == "npo-repo" and self.rows == ("idk",) and self.retain == "nll":
            # the NPO paper's code takes one token mean over both kinds of rows
            forget, keep = settings.forget_weight, settings.retain_weight
            logps = forget * batch.rows("idk").logps.sum() + keep * batch.rows("retain").logps.sum()
            return -logps / (batch.tokens("idk") + batch.tokens("retain"))
        terms = [("forget", self.loss(batch, settings), settings.forget_weight)]
        if self.retain == "nll":
            nll = batch.nll("retain")
            if self.dual:  # a constraint: the constant does not change the gradient, but what is reported
                nll = nll - settings.epsilon * batch.share("retain")
            terms.append(("retain", nll, settings.retain_weight))
        if self.retain == "activations":
            terms.append(("retain", activation_distance(batch), settings.retain_weight))
        if observe is not None:
            for term in terms:
                observe(*term)
        first, *rest = (weight * value for _, value, weight in terms)
        return first + rest[0] if rest else first


def activation_distance(batch: Batch) -> Tensor:
    """mean_b (1/n_b) sum_t (1/H) ||h_t - h_ref,t||^2 on the retain rows, whose activations are to stay as they were."""
    rows = batch.rows("retain")
    now, before = require(rows.activations, "activations"), require(rows.ref_activations, "frozen activations")
    distance = (now.float() - before.float()).square().mean(-1)
    return batch.sequence_mean(within_sequences(distance, rows), "retain")


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry. ValueError where its name or an alias is taken."""
    taken = {name for m in METHODS.values() for name in (m.name, *m.aliases)} & {method.name, *method.aliases}
    if taken:
        raise ValueError(f"method {method.name}: {', '.join(sorted(taken))} is taken; choose another name")
    if method.reads not in get_args(Reads):
        raise ValueError(f"method {method.name}: reads: expected one of {get_args(Reads)}, got {method.reads!r}")
    METHODS[method.name] = method
    return method


def register_family(
    name: str,
    label: str,
    *,
    rt: Mapping[str, float] | None = None,
    alone: Retain | None = None,
    **record,
) -> None:
    """Three methods: `name` alone, `name_rt` with the NLL of the retain rows, `name_kl` with the KL divergence.

    Args:
        rt: further defaults where there is a retain term.
        alone: retain term of the first, where the paper's method has one of its own.
        aliases: {suffix: names}, such as {"_rt": ("grad_diff",)}.
    """
    defaults, aliases = record.pop("defaults", {}), record.pop("aliases", {})
    for suffix, retain in SUFFIXES.items():
        register(
            Method(
                name=name + suffix,
                label=label + suffix.upper().replace("_", "+"),
                family=name,
                retain=retain or alone,
                defaults={**defaults, **(rt or {})} if retain else defaults,
                aliases=aliases.get(suffix, ()),
                **record,
            )
        )


def method_named(name: str) -> Method:
    """The method with this name or alias. ValueError, with the nearest name, if there is none."""
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    near = difflib.get_close_matches(name, METHODS, n=3) or list(METHODS)
    raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}; did you mean {near[0]}?")


def step_mean(batch: Batch, value: float) -> Tensor:
    """`value` as a mean over the step's forget rows, of which this part contributes its share."""
    return batch.sequence_mean(torch.full_like(batch.rows("forget").logps, value))
