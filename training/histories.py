"""Metrics of runs over epochs and seeds. A history is a list of {"step", "epoch", ...}, one entry an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

History = Sequence[Mapping[str, Any]]
Histories = Mapping[str, Sequence[History]]  # {method: one a seed}

KEPT = 0.8  # a metric counts as kept above this share of its value before unlearning


def histories_of(metrics: Mapping[str, Any], scenario: str) -> Histories:
    """{method: histories of its seeds} of a grid's metrics, in the order of the runs."""
    found: dict[str, list[History]] = {}
    for run in metrics["runs"]:
        if run["scenario"] == scenario:
            found.setdefault(run["method"], []).append(run["history"])
    return found


def over_seeds(histories: Sequence[History], key: str) -> np.ndarray:
    """(seeds, evaluations); NaN where a number was not measured."""
    return np.array([[entry[key] for entry in history] for history in histories], dtype=float)


def at_end(histories: Sequence[History], key: str) -> float:
    """The median over the seeds, at the last evaluation."""
    return float(np.median(over_seeds(histories, key)[:, -1]))


class Rank(NamedTuple):
    """A method at the end of its runs, medians over the seeds."""

    name: str
    forgetting: float
    utility: float
    kept: bool  # enough of the utility
    on_frontier: bool  # no other method is better in one number and as good in the other


def ranking(histories: Histories, forgetting: str, utility: str, least: float) -> list[Rank]:
    """Those that keep a utility of `least` by how well they forget, then the others by their utility."""
    ends = {name: (at_end(runs, forgetting), at_end(runs, utility)) for name, runs in histories.items()}

    def beaten(name: str) -> bool:
        mine = ends[name]
        return any(other[0] >= mine[0] and other[1] >= mine[1] and other != mine for other in ends.values())

    ranks = [Rank(name, f, u, u >= least, not beaten(name)) for name, (f, u) in ends.items()]
    return sorted(ranks, key=lambda r: (not r.kept, -r.forgetting if r.kept else -r.utility))


def best_while_kept(histories: Sequence[History], wanted: str, kept: str, least: float) -> float:
    """The best median of `wanted` at an evaluation after the start where the median of `kept` is at least `least`."""
    best, keeps = (np.median(over_seeds(histories, key), axis=0)[1:] for key in (wanted, kept))
    return float(np.max(best, initial=0.0, where=keeps >= least))
