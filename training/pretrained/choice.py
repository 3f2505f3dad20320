"""Choose the learning rate and other settings of each method, on a forget set that is not reported.

Of the settings that keep 90 % of the utility of the retrained model, the one with the best forget quality; where none
keeps it, the one that keeps the most. A method without a retain term gets the one with the best forget quality: what
that costs in utility is the question about it. Retrained is the model without half of the authors, which has not seen
those of this forget set either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from training.methods import METHODS
from training.pretrained.outcomes import NEAR
from training.pretrained.plan import Run, Tried
from training.pretrained.utility import known_parts, utility

TAKES = {"ga": ("npo", "npo_rt")}  # the two differ in their losses alone then, as in the paper


def outcome(tried: Tried, history: Sequence[Mapping[str, Any]], retrained: Mapping[str, Any]) -> dict[str, Any]:
    """The record of one try: its settings, its end, and the utility of the retrained model."""
    end, parts = history[-1], known_parts([retrained])
    return tried._asdict() | {
        "forget_quality": end["forget_quality"],
        "forget_prob": end["forget_prob"],
        "utility": utility(end, parts),
        "retrained_utility": utility(retrained, parts),
    }


def marked(tries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With "chosen": true at one try of each method."""
    best: dict[str, Mapping[str, Any]] = {}
    for tried in tries:
        if tried["method"] not in best or _rank(tried) > _rank(best[tried["method"]]):
            best[tried["method"]] = tried
    return [{**tried, "chosen": tried is best[tried["method"]]} for tried in tries]


def _rank(tried: Mapping[str, Any]) -> tuple[bool, float]:
    kept = tried["utility"] >= NEAR * tried["retrained_utility"] or not METHODS[tried["method"]].retain
    return kept, tried["forget_quality"] if kept else tried["utility"]


def chosen(tries: Sequence[Mapping[str, Any]], run: Run) -> dict[str, float]:
    """The settings of a run that are not the method's own, from marked tries. ValueError where it has none.

    A method that takes the choice of another one takes its learning rate and retain weight alone.
    """
    source = source_of(run.method, {tried["method"] for tried in tries})
    found = next(tried for tried in tries if tried["method"] == source and tried["chosen"])
    settings = {"lr": found["lr"]}
    if METHODS[run.method].retain:
        settings["retain_weight"] = found["retain_weight"] if run.retain_weight is None else run.retain_weight
    if source == run.method:
        settings |= {name: found[name] for name in ("beta", "forget_weight") if found[name] is not None}
    return settings


def source_of(method: str, tuned: set[str]) -> str:
    """The method whose choice this one takes: its own, or that of the same loss with retain rows."""
    family = method.split("_")[0]
    for name in (method, *TAKES.get(method, ()), f"{family}_rt", "npo_rt"):
        if name in tuned:
            return name
    raise ValueError(f"{method}: expected a try of it, or of {family}_rt or npo_rt, got {', '.join(sorted(tuned))}")


def relearning_lr(tries: Sequence[Mapping[str, Any]]) -> float:
    """One for all models: that of NPO+RT."""
    return chosen(tries, Run("forget10", "npo_rt", 0))["lr"]
