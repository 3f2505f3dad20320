"""Points on the curve of a run, interpolated linearly between measurements."""

import numpy as np


def first_place(values: np.ndarray, level: float) -> float:
    """Where the values (E,) first are at `level` or above, as an index with a fraction; the last index if nowhere."""
    reached = np.flatnonzero(values >= level)
    i = reached[0] if len(reached) else len(values) - 1
    rest = (values[i] - level) / (values[i] - values[i - 1]) if i and len(reached) else 0.0
    return float(i - rest)


def at_place(values: np.ndarray, place: float) -> float:
    """The value there."""
    return float(np.interp(place, np.arange(len(values)), values))
