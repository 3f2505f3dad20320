"""How far the numbers can be trusted: the p-value of a Kolmogorov-Smirnov (KS) test falls with the rows, and the
utility is a mean over few.

Forget quality (TOFU, arXiv 2401.06121) is the p-value of the two-sided, exact test between the log truth ratios of two
models on the forget set. Two models that never saw it are the ceiling of what unlearning can reach; fewer rows make
any model look better.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from training.benchmarks.tofu.claims import GOOD_QUALITY
from training.benchmarks.tofu.summary import UTILITY_SETS
from training.metrics import forget_quality
from training.pretrained.findings import RESAMPLES, Interval
from training.pretrained.outcomes import Arm, Measure, Outcomes, row_values
from training.pretrained.plan import HEADLINE
from training.reports.claims import CONFIDENCE

FEWER = (20, 40, 60)  # rows, drawn without replacement
MORE = (200, 400)  # rows, drawn with replacement: what the same effect would give
DRAWS = 200
RATIO = "log_truth_ratio"


class Spread(NamedTuple):
    """Of p-values."""

    low: float  # quartiles
    median: float
    high: float

    def words(self) -> str:
        if self.low == self.high:
            return f"{self.median:.2g}"
        return f"{self.median:.2g} [{self.low:.2g}, {self.high:.2g}]"


def statistics(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(draws, n), (draws, n) -> (draws,) KS statistics D = max |F_1 - F_2|, one a draw, counted in rows: n D."""
    n = first.shape[1]
    values = np.concatenate([first, second], axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    values = np.take_along_axis(values, order, axis=1)
    above = np.cumsum(np.where(order < n, 1, -1), axis=1)
    last = np.ones(values.shape, dtype=bool)  # of equal values: both distributions step there at once
    last[:, :-1] = values[:, 1:] > values[:, :-1]
    return np.where(last, abs(above), 0).max(axis=1)


@cache
def p_value(n: int, rows: int) -> float:
    """Of D >= rows / n between n and n examples without ties, exactly, as a quotient of whole numbers.

    2 sum_{i >= 1} (-1)^(i-1) C(2n, n - i rows) / C(2n, n) (Gnedenko and Korolyuk 1951). `metrics.forget_quality` gives
    the same, but scipy leaves the exact test where n is large and the p-value small.
    """
    if not rows:
        return 1.0
    terms = ((-1) ** (i - 1) * comb(2 * n, n - i * rows) for i in range(1, n // rows + 1))
    return 2 * sum(terms) / comb(2 * n, n)


def p_values(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(draws, n), (draws, n) -> (draws,)"""
    return np.array([p_value(first.shape[1], int(rows)) for rows in statistics(first, second)])


def resampled(first: np.ndarray, second: np.ndarray, n: int, seed: int = 0, draws: int = DRAWS) -> Spread:
    """The test on `n` rows drawn from those of both models, the same of each.

    Without replacement up to the number of rows there are; with it beyond, which says what p the differences that are
    seen here would have if they were those of `n` rows. NaN where a value is none.
    """
    rng, rows = np.random.default_rng(seed), len(first)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Spread(np.nan, np.nan, np.nan)
    if n == rows:
        picked = np.arange(rows)[None]
    elif n < rows:
        picked = np.argsort(rng.random((draws, rows)), axis=1)[:, :n]
    else:
        picked = rng.integers(rows, size=(draws, n))
    return Spread(*np.quantile(p_values(first[picked], second[picked]), (0.25, 0.5, 0.75)).tolist())


def detectable_rows(n: int) -> int:
    """The least n D of which the test on n against n examples says p <= 0.05."""
    return next(rows for rows in range(1, n + 1) if p_value(n, rows) <= GOOD_QUALITY)


def detectable_shift(n: int) -> float:
    """The same as a shift between two normal distributions, in their standard deviations: D = 2 Phi(shift / 2) - 1."""
    return float(2 * norm.ppf((1 + detectable_rows(n) / n) / 2))


def utility_shares(outcomes: Outcomes, scenario: str) -> dict[str, Interval]:
    """{model or end of a run of the first seed: its utility as a share of the retain model's}."""
    retain = outcomes.retain(scenario)
    found = {"retain model, another seed": outcomes.other_retain(scenario), "full model": outcomes.models.get("full")}
    found |= {outcomes.label(arm): arm.runs[0].end for arm in outcomes.arms.get(scenario, []) if arm.method in HEADLINE}
    return {
        name: utility_share([measure], retain, outcomes.parts)
        for name, measure in found.items()
        if retain and measure and {"utility_rows"} <= retain.keys() & measure.keys()
    }


def utility_share(measures: Sequence[Measure], retain: Measure, parts: Sequence[str]) -> Interval:
    """Utility as a share of the retain model's, mean over the measures, with the interval of resampled rows.

    The rows are the same ones of all models, in each set.
    """
    rng, picked = np.random.default_rng(0), {}
    for name in UTILITY_SETS:
        n = len(retain["utility_rows"][f"{name}_prob"])
        picked[name] = np.concatenate([np.arange(n)[None], rng.integers(n, size=(RESAMPLES, n))])
    *found, against = (
        _utilities({part: m["utility_rows"][part] for part in parts}, picked) for m in (*measures, retain)
    )
    of = np.mean(found, axis=0)
    share = np.divide(of, against, out=np.zeros_like(of), where=against > 0)
    return Interval(float(share[0]), *np.quantile(share[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist())


def _utilities(rows: Mapping[str, Sequence[float]], picked: Mapping[str, np.ndarray]) -> np.ndarray:
    """{part: (rows,)}, {set: (draws, rows)} -> (draws,) harmonic means of the means over the rows that are picked."""
    means = [np.asarray(values)[picked[name.split("_")[0]]].mean(axis=1) for name, values in rows.items()]
    with np.errstate(divide="ignore"):  # a part that is 0 makes the utility 0
        return len(means) / sum(1 / mean for mean in means)


def ceiling(outcomes: Outcomes, scenario: str) -> float:
    """Forget quality of the retain model of another seed; NaN where it was not measured."""
    return pair_quality(outcomes.other_retain(scenario), outcomes.retain(scenario))


def pair_quality(first: Measure | None, second: Measure | None) -> float:
    if first is None or second is None:
        return float("nan")
    return forget_quality(row_values(first, RATIO), row_values(second, RATIO))


def pairs(outcomes: Outcomes, scenario: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{what is held against the retain model: (its log truth ratios, the retain model's)}."""
    retain = outcomes.retain(scenario)
    if retain is None:
        return {}
    found: Mapping[str, Measure | None] = {
        "full model": outcomes.models.get("full"),
        "NPO+RT, best": best_measure(outcomes, outcomes.arm(scenario, "npo_rt")),
        "retain model, another seed": outcomes.other_retain(scenario),
    }
    return {name: (row_values(m, RATIO), row_values(retain, RATIO)) for name, m in found.items() if m}


def best_measure(outcomes: Outcomes, arm: Arm | None) -> Measure | None:
    """Of the first seed: the best checkpoint, the last one where the utility is never kept."""
    if arm is None:
        return None
    return arm.runs[0].best(outcomes.least_utility(arm.scenario)) or arm.runs[0].end
