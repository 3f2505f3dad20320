"""The contents of the page of a grid: the metrics of a summary, and the models that have them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from training.benchmarks.base import Benchmark, Column
from training.histories import KEPT, History, ranking
from training.methods import METHODS


class Mark(NamedTuple):
    """How methods with the same retain term are drawn."""

    symbol: str  # of page.html
    dashes: str  # of its path, as SVG takes them
    words: str


MARKS = {
    "nll": Mark("dot", "none", "NLL of the retain rows"),
    None: Mark("ring", "6 4", "no retain term"),
    "kl": Mark("diamond", "2 3", "KL on the retain rows"),
    "activations": Mark("triangle", "8 3 2 3", "activations on the retain rows"),
}


class Number(NamedTuple):
    """One number of a summary: at the end of unlearning, or after an attack on the unlearned model."""

    key: str
    column: Column
    attack: str = ""

    @property
    def heading(self) -> str:
        return f"{self.column.heading}, {self.attack}" if self.attack else self.column.heading

    @property
    def title(self) -> str:
        return self.column.panel or self.column.heading


class Model(NamedTuple):
    """A line of the tables: a method with its seeds, or one of the two models that unlearning is compared with."""

    id: str
    label: str
    mark: Mark
    colour: str  # "": that of the text
    about: str
    seeds: Sequence[int]
    histories: Sequence[History]  # of each seed; their last entries are the summaries
    attacks: Sequence[Mapping[str, Mapping[str, Any]]]  # of each seed: {attack: summary}
    place: int | None = None  # in the ranking
    kept: bool = True  # enough of the utility
    on_frontier: bool = False

    def values(self, number: Number) -> list[float]:
        """One a seed; NaN where it was not measured."""
        if number.attack:
            return [measured(attacks.get(number.attack, {}), number.key) for attacks in self.attacks]
        return [measured(history[-1], number.key) for history in self.histories]


def measured(summary: Mapping[str, Any], key: str) -> float:
    """NaN where it was not, or is no finite number."""
    value = summary.get(key)
    return float(value) if value is not None and math.isfinite(value) else math.nan


def middle(values: Sequence[float]) -> float:
    """The median of the measured values; NaN if there are none."""
    found = [value for value in values if not math.isnan(value)]
    return float(np.median(found)) if found else math.nan


def models_of(metrics: Mapping[str, Any], benchmark: Benchmark) -> list[Model]:
    """Before, retrained, then the methods: by rank where that was measured, else as they were run."""
    name = benchmark.scenario
    start, retrained = metrics["start"][name], metrics["retrained"].get(name)
    found = [_compared("before", "square", "the model that learned all rows", start)]
    if retrained:
        found.append(_compared("retrained", "star", "a model that never saw what is to be forgotten", retrained))
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for run in metrics["runs"]:
        if run["scenario"] == name:
            runs.setdefault(run["method"], []).append(run)
    methods = {method: _unlearned(method, some) for method, some in runs.items()}
    return found + _ranked(methods, start, benchmark)


def _compared(label: str, symbol: str, about: str, summary: Mapping[str, Any]) -> Model:
    return Model(label, label, Mark(symbol, "none", about), "", about, [0], [[summary]], [{}])


def _unlearned(name: str, runs: Sequence[Mapping[str, Any]]) -> Model:
    method = METHODS[name]
    about = f"{method.formula} ({method.source}); {method.cost}"
    attacks = [{**(run.get("rounded") or {}), **(run.get("attacks") or {})} for run in runs]
    seeds, histories = [run["seed"] for run in runs], [run["history"] for run in runs]
    return Model(name, method.label, MARKS[method.retain], method.colour, about, seeds, histories, attacks)


def _ranked(methods: dict[str, Model], start: Mapping[str, Any], benchmark: Benchmark) -> list[Model]:
    keys = benchmark.trade_off
    if not keys or any(math.isnan(measured(start, key)) for key in keys):
        return list(methods.values())
    complete = {
        name: [[history[-1]] for history in model.histories]
        for name, model in methods.items()
        if not any(math.isnan(measured(history[-1], key)) for history in model.histories for key in keys)
    }
    ranks = ranking(complete, keys.forgetting, keys.utility, KEPT * start[keys.utility])
    placed = [
        methods[rank.name]._replace(place=place, kept=rank.kept, on_frontier=rank.on_frontier)
        for place, rank in enumerate(ranks, 1)
    ]
    return placed + [model for name, model in methods.items() if name not in complete]


def numbers_of(models: Sequence[Model], benchmark: Benchmark) -> list[Number]:
    """The columns that some model has, details included; then, of every attack, those that tell of forgetting."""
    forgetting = benchmark.trade_off.forgetting if benchmark.trade_off else ""
    attacks = dict.fromkeys(name for model in models for summaries in model.attacks for name in summaries)
    candidates = [Number(key, column) for key, column in benchmark.columns.items()]
    candidates += [
        Number(key, column, attack)
        for attack in attacks
        for key, column in benchmark.columns.items()
        if not column.detail and (key.startswith("forget_") or key == forgetting)
    ]
    return [n for n in candidates if any(not math.isnan(middle(model.values(n))) for model in models)]
