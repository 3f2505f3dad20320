"""Numbers of runs over epochs and seeds. A history is a list of {"step", "epoch", ...}, one entry an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

History = Sequence[Mapping[str, Any]]
Histories = Mapping[str, Sequence[History]]  # {method: one a seed}


def over_seeds(histories: Sequence[History], key: str) -> np.ndarray:
    """(seeds, evaluations); NaN where a number was not measured."""
    return np.array([[entry[key] for entry in history] for history in histories], dtype=float)


def at_end(histories: Sequence[History], key: str) -> float:
    """The median over the seeds, at the last evaluation."""
    return float(np.median(over_seeds(histories, key)[:, -1]))


def best_while_kept(histories: Sequence[History], wanted: str, kept: str, least: float) -> float:
    """The best median of `wanted` at an evaluation after the start where the median of `kept` is at least `least`."""
    best, keeps = (np.median(over_seeds(histories, key), axis=0)[1:] for key in (wanted, kept))
    return float(np.max(best, initial=0.0, where=keeps >= least))
