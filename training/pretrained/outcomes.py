"""The records of a study on a pre-trained model, for its report: models, runs, and arms of runs.

An arm is a method with one retain weight and as many epochs in one scenario; its runs differ in their seed. Any record
may be absent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.benchmarks.tofu.claims import GOOD_QUALITY
from training.methods import METHODS
from training.pretrained.plan import PERCENTS, retrained_on
from training.pretrained.utility import UTILITY, known_parts, utility

QUALITY, PROB = "forget_quality", "forget_prob"
NEAR = 0.9  # share of the retain model's utility that counts as its utility
SCENARIOS = tuple(PERCENTS)
SET_ASIDE = "set_aside"  # folder of records, with a README.md that says why
Measure = Mapping[str, Any]  # {"summary": {name: number}, "rows": {name: one a row of the forget set}}, and more


def number(measure: Measure | None, key: str) -> float:
    """Of a summary; NaN where it was not measured."""
    value = measure["summary"].get(key) if measure else None
    return math.nan if value is None else float(value)


def row_values(measure: Measure, key: str) -> np.ndarray:
    """(rows,) float64."""
    return np.array(measure["rows"][key], dtype=np.float64)


@dataclass(frozen=True)
class Run:
    """One unlearning: evaluations ("checkpoints") from step 0, the full model, to the end."""

    record: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def lr(self) -> float:
        return self.record["lr"]

    @property
    def checkpoints(self) -> Sequence[Mapping[str, Any]]:
        return self.record["checkpoints"]

    @property
    def attacks(self) -> Mapping[str, Measure]:
        return self.record.get("attacks") or {}

    @property
    def end(self) -> Mapping[str, Any]:
        return self.checkpoints[-1]

    def path(self, key: str) -> np.ndarray:
        """(checkpoints,) of a number of the summaries."""
        return np.array([number(checkpoint, key) for checkpoint in self.checkpoints])

    @property
    def steps(self) -> np.ndarray:
        return np.array([checkpoint["step"] for checkpoint in self.checkpoints])

    def best(self, least: float) -> Mapping[str, Any] | None:
        """The checkpoint after the start of the highest forget quality where the utility is at least `least`."""
        kept = [c for c in self.checkpoints[1:] if number(c, UTILITY) >= least and not math.isnan(number(c, QUALITY))]
        return max(kept, key=lambda checkpoint: number(checkpoint, QUALITY), default=None)


class Arm(NamedTuple):
    scenario: str
    method: str
    retain_weight: float | None  # None: the method has no retain term
    epochs: float
    runs: tuple[Run, ...]  # by seed

    def ends(self, key: str) -> np.ndarray:
        """(seeds,)"""
        return np.array([number(run.end, key) for run in self.runs])

    def paths(self, key: str) -> np.ndarray:
        """(seeds, checkpoints), of the checkpoints that all seeds have."""
        paths = [run.path(key) for run in self.runs]
        common = min(map(len, paths))
        return np.array([path[:common] for path in paths])

    def best_qualities(self, least: float) -> np.ndarray:
        """(seeds,) the highest forget quality at a utility of at least `least`; 0 where the utility is never kept."""
        found = [run.best(least) for run in self.runs]
        return np.array([number(checkpoint, QUALITY) if checkpoint else 0.0 for checkpoint in found])


@dataclass(frozen=True)
class Outcomes:
    """The contents of a folder of records."""

    config: Mapping[str, Any] | None
    models: Mapping[str, Measure]
    choice: Sequence[Mapping[str, Any]]
    costs: Any
    records: Sequence[Mapping[str, Any]]  # of the runs
    set_aside: Sequence[Mapping[str, Any]] = ()  # the same, of runs whose settings are no longer those of the study

    @classmethod
    def read(cls, folder: Path) -> "Outcomes":
        """The JSON files of `folder`, each summary with its utility. ValueError where one is no JSON."""
        models = _read(folder / "models.json") or {}
        runs, set_aside = ([_read(path) for path in sorted((folder / of).glob("*.json"))] for of in ("runs", SET_ASIDE))
        parts = _parts(models)
        for record in (*models.values(), *runs, *set_aside):
            for measure in (record, *record.get("checkpoints", ()), *record.get("attacks", {}).values()):
                if "summary" in measure:
                    measure["summary"][UTILITY] = utility(measure["summary"], parts)
        return cls(
            config=_read(folder / "config.json"),
            models=models,
            choice=_read(folder / "choice.json") or [],
            costs=_read(folder / "costs.json"),
            records=runs,
            set_aside=set_aside,
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """Of the utility."""
        return _parts(self.models)

    @cached_property
    def arms(self) -> dict[str, list[Arm]]:
        """{scenario: its arms}, in the order of `METHODS`, then by weight and epochs."""
        found: dict[tuple[str, str, float | None, float], list[Run]] = {}
        for record in self.records:
            if record["checkpoints"]:
                key = record["scenario"], record["method"], record["retain_weight"], record["epochs"]
                found.setdefault(key, []).append(Run(record))
        order = list(METHODS)
        arms = [Arm(*key, tuple(sorted(runs, key=lambda run: run.seed))) for key, runs in found.items()]
        arms.sort(key=lambda arm: (order.index(arm.method), arm.retain_weight or 0.0, arm.epochs))
        scenarios = [*SCENARIOS, *sorted({arm.scenario for arm in arms} - set(SCENARIOS))]
        return {name: some for name in scenarios if (some := [arm for arm in arms if arm.scenario == name])}

    def weights(self, scenario: str, method: str) -> list[Arm]:
        """The arms of one method by weight, of as many epochs as the others."""
        arms = [arm for arm in self.arms.get(scenario, []) if arm.method == method]
        return [arm for arm in arms if arm.epochs == min(arm.epochs for arm in arms)]

    def longer(self, scenario: str, method: str) -> Arm | None:
        """The arm of more epochs than the others, if there is one."""
        usual = self.weights(scenario, method)
        return next((a for a in self.arms.get(scenario, []) if a.method == method and a not in usual), None)

    def arm(self, scenario: str, method: str) -> Arm | None:
        """That of the chosen retain weight, if it was run; else the one of most seeds."""
        arms = self.weights(scenario, method)
        chosen = {c["retain_weight"] for c in self.choice if c["method"] == method and c["chosen"]}
        return max(arms, key=lambda arm: (arm.retain_weight in chosen, len(arm.runs)), default=None)

    def main_arms(self, scenario: str) -> list[Arm]:
        """One a method."""
        found = (self.arm(scenario, method) for method in METHODS)
        return [arm for arm in found if arm]

    def label(self, arm: Arm) -> str:
        """With the weight where the scenario has several, and the epochs where they are more than the others'."""
        several = len(self.weights(arm.scenario, arm.method)) > 1
        weight = f", weight {arm.retain_weight:g}" if several and arm.retain_weight else ""
        return METHODS[arm.method].label + weight + self.more_epochs(arm)

    def more_epochs(self, arm: Arm) -> str:
        return f", {arm.epochs:g} epochs" if arm == self.longer(arm.scenario, arm.method) else ""

    def retain(self, scenario: str) -> Measure | None:
        """The model trained without the forget set."""
        return self.models.get(retrained_on(scenario))

    def other_retain(self, scenario: str) -> Measure | None:
        """The same with another seed."""
        return self.models.get(f"{retrained_on(scenario)}_seed1")

    def retain_utility(self, scenario: str) -> float:
        return number(self.retain(scenario), UTILITY)

    def least_utility(self, scenario: str) -> float:
        """From which on a utility counts as that of the retain model."""
        return NEAR * self.retain_utility(scenario)


def _parts(models: Mapping[str, Measure]) -> tuple[str, ...]:
    return known_parts(model["summary"] for name, model in models.items() if name.startswith("retain"))


def reaches(qualities: np.ndarray) -> np.ndarray:
    """(seeds,) bool: not told apart from the retain model."""
    return qualities > GOOD_QUALITY


def middle_and_range(values: np.ndarray, digits: int = 2) -> str:
    """The median, and in brackets the smallest and largest of several."""
    middle = f"{np.median(values):.{digits}g}"
    return middle if len(values) == 1 else f"{middle} [{values.min():.{digits}g}, {values.max():.{digits}g}]"


def seeds_words(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as reason:
        raise ValueError(
            f"{path}: expected a JSON record, got none: {reason}; delete it and run the study again"
        ) from None
