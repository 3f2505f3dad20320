"""The utility of a small model: TOFU's, of the parts that a model which never saw the forget set can do at all.

TOFU's model utility is a harmonic mean of nine numbers, and so of its smallest one alone where a model answers next to
none of the questions about real authors: one answer more or less then doubles it. Parts below `LEAST` in a retain model
are left out for all models. What is forgotten plays no role in that.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from training.benchmarks.tofu.claims import UTILITY as TOFU_UTILITY
from training.benchmarks.tofu.summary import UTILITY_PARTS
from training.metrics import model_utility

__all__ = ["LEAST", "TOFU_UTILITY", "UTILITY", "known_parts", "utility"]

UTILITY = "utility"  # of a summary, beside TOFU's own
LEAST = 0.1
Summary = Mapping[str, Any]


def known_parts(retrained: Iterable[Summary]) -> tuple[str, ...]:
    """The parts that count, by the summaries of the models that never saw a forget set; all, where there is none."""
    models = list(retrained)
    return tuple(part for part in UTILITY_PARTS if all((model.get(part) or 0.0) >= LEAST for model in models))


def utility(summary: Summary, parts: Iterable[str]) -> float:
    """Harmonic mean of the parts; NaN where one was not measured."""
    values = [summary.get(part) for part in parts]
    return math.nan if None in values or not values else model_utility([float(v) for v in values if v is not None])
