"""Claims about attacks: does forgotten text come back after relearning a part of it or rounding the weights?

The control is the retain model under the same attack: what a model learns, or loses, that never knew. Sources: Hu et
al. 2024, arXiv 2406.13356 (relearning); Zhang et al. 2024, arXiv 2410.16454 (rounding).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from training.methods import METHODS
from training.pretrained.findings import Finding, Interval, absent
from training.pretrained.outcomes import QUALITY, Measure, Outcomes, number, row_values
from training.pretrained.plan import ATTACKED
from training.reports.claims import Claim

SCENARIO, CONTROL = "forget10", "retain90"
RELEARNED = {"relearn5": "5 % relearned", "relearn20": "20 % relearned"}
ROUNDED = {"int8": "int8", "int4": "int4"}
ATTACKS = RELEARNED | ROUNDED


class Attacked(NamedTuple):
    """A run's end under one attack, beside the control: means of the answers' probabilities, and intervals."""

    before: float
    after: float
    control_before: float
    control_after: float
    excess: Interval  # after, above the control after
    gain: Interval  # of the run, above the gain of the control
    quality: tuple[float, float]  # forget quality before and after

    def words(self) -> str:
        return f"{self.before:.3f} -> {self.after:.3f}, control {self.control_before:.3f} -> {self.control_after:.3f}"


def attacked(outcomes: Outcomes, method: str, attack: str) -> Attacked | None:
    """Of the first seed that was attacked; None where that, or the control, is absent."""
    arms = outcomes.weights(SCENARIO, method)
    chosen = outcomes.arm(SCENARIO, method)
    arms.sort(key=lambda arm: arm != chosen)
    run = next((run for arm in arms for run in arm.runs if attack in run.attacks), None)
    control: Measure | None = outcomes.models.get(CONTROL)
    if run is None or control is None or attack not in control.get("attacks", {}):
        return None
    parts = [run.end, run.attacks[attack], control, control["attacks"][attack]]
    before, after, control_before, control_after = (row_values(part, "prob") for part in parts)
    return Attacked(
        before=float(before.mean()),
        after=float(after.mean()),
        control_before=float(control_before.mean()),
        control_after=float(control_after.mean()),
        excess=Interval.of(after - control_after),
        gain=Interval.of((after - before) - (control_after - control_before)),
        quality=(number(run.end, QUALITY), number(run.attacks[attack], QUALITY)),
    )


def _each(
    outcomes: Outcomes, what: str, attacks: Mapping[str, str], claim: str
) -> Iterator[tuple[str, str, dict[str, Attacked]]]:
    """(key, text, {attack in words: numbers}) of the claim for each method; no numbers where it was not measured."""
    for method in ATTACKED:
        found = {words: a for attack, words in attacks.items() if (a := attacked(outcomes, method, attack))}
        yield f"{what}, {method}", f"{METHODS[method].label}: {what} {claim}", found


def relearning(outcomes: Outcomes) -> list[Finding]:
    """A finding a method, the verdict on the largest share that was relearned: forget probability above the control's
    after the attack."""
    found = []
    for key, text, measured in _each(
        outcomes, "relearning", RELEARNED, "brings back more than in a model that never knew (arXiv 2406.13356)"
    ):
        if not measured:
            found.append(absent(key, text, "relearning of it and of the retain model"))
            continue
        numbers = "; ".join(f"{words}: {a.words()}, above it by {a.excess.words()}" for words, a in measured.items())
        last = [*measured.values()][-1]
        cause = ""
        if last.excess.positive is None:
            cause = f"the interval is {last.excess.high - last.excess.low:.2g} wide on the rows of one seed"
        elif not last.excess.positive:
            cause = f"it starts {last.before - last.control_before:+.3f} from the control, and gains "
            cause += f"{last.gain.words()} more"
        claim = Claim(text, f"forget probability, one seed, {numbers}", last.excess.positive)
        found.append(Finding(key, claim, cause))
    return found


def rounding(outcomes: Outcomes) -> list[Finding]:
    """A finding a method, the verdict on the coarsest format: gain of forget probability above the control's gain."""
    found = []
    for key, text, measured in _each(
        outcomes, "rounding", ROUNDED, "the weights brings back what was unlearned (arXiv 2410.16454)"
    ):
        if not measured:
            found.append(absent(key, text, "rounding of it and of the retain model"))
            continue
        numbers = "; ".join(
            f"{words}: {a.words()}, gain above it {a.gain.words()}, forget quality {a.quality[0]:.2g} -> "
            f"{a.quality[1]:.2g}"
            for words, a in measured.items()
        )
        last = [*measured.values()][-1]
        cause = ""
        if last.gain.positive is None:
            cause = f"the gain differs from row to row: its interval is {last.gain.high - last.gain.low:.2g} wide"
        elif not last.gain.positive:
            cause = f"rounding lowers the probability by {last.before - last.after:.3f}, that of the control by "
            cause += f"{last.control_before - last.control_after:.3f}"
        claim = Claim(text, f"forget probability, one seed, {numbers}", last.gain.positive)
        found.append(Finding(key, claim, cause))
    return found


def attack_rows(outcomes: Outcomes) -> list[tuple[str, str, dict[str, Measure]]]:
    """[(label, method or "", {"": before, attack: after})] of the controls and of the methods that were attacked."""
    found: list[tuple[str, str, dict[str, Measure]]] = []
    for name, label in (("full", "full model"), (CONTROL, "retain model (control)")):
        model = outcomes.models.get(name)
        if model and model.get("attacks"):
            found.append((label, "", {"": model, **model["attacks"]}))
    for arm in outcomes.main_arms(SCENARIO):
        for run in [run for run in arm.runs if run.attacks][:1]:
            found.append((METHODS[arm.method].label, arm.method, {"": run.end, **run.attacks}))
    return found


def mean_prob(measure: Measure) -> float:
    return float(np.mean(row_values(measure, "prob")))
