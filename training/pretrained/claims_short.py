"""Claims of the SimNPO paper (arXiv 2410.07163) on short answers, rows of forget10 split at the median of their tokens.

What is left of a row is its answer's probability minus that which the retain model gives it, each method at its best
checkpoint, mean over the seeds that both methods have. Rows are resampled for the intervals, seeds are not.
"""

from typing import NamedTuple

import numpy as np

from training.metrics import forget_quality
from training.pretrained.findings import Finding, Interval, absent
from training.pretrained.noise import RATIO
from training.pretrained.outcomes import Measure, Outcomes, row_values
from training.reports.claims import Claim

SCENARIO = "forget10"
MISSING = f"NPO+RT, SimNPO+RT and the retain model in {SCENARIO}"


class Halves(NamedTuple):
    """Of the forget rows."""

    short: np.ndarray  # (rows,) bool: at most the median number of tokens
    tokens: float  # the median
    left: dict[str, np.ndarray]  # {method: (rows,) what is left, mean over the seeds}
    quality: dict[str, tuple[float, float]]  # {method: KS p of the short and of the long rows, median over the seeds}

    def of(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """What is left of the short rows, and of the long ones."""
        return self.left[method][self.short], self.left[method][~self.short]

    def qualities(self) -> str:
        npo, simnpo = self.quality["npo_rt"], self.quality["simnpo_rt"]
        return (
            f"forget quality of the short rows {npo[0]:.2g} and {simnpo[0]:.2g}, long {npo[1]:.2g} and {simnpo[1]:.2g}"
        )


def halves(outcomes: Outcomes) -> Halves | None:
    """None where a record is absent, or all answers have one length."""
    retain = outcomes.retain(SCENARIO)
    arms = {method: outcomes.arm(SCENARIO, method) for method in ("npo_rt", "simnpo_rt")}
    if retain is None or not all(arms.values()):
        return None
    runs = {method: {run.seed: run for run in arm.runs} for method, arm in arms.items() if arm}
    seeds = sorted(set.intersection(*(set(some) for some in runs.values())))
    tokens = row_values(retain, "num_tokens")
    short = tokens <= np.median(tokens)
    if not seeds or short.all():
        return None
    least = outcomes.least_utility(SCENARIO)
    left, quality = {}, {}
    for method, of_method in runs.items():
        measures: list[Measure] = [of_method[seed].best(least) or of_method[seed].end for seed in seeds]
        left[method] = np.mean([row_values(m, "prob") - row_values(retain, "prob") for m in measures], axis=0)
        quality[method] = (_quality(measures, retain, short), _quality(measures, retain, ~short))
    return Halves(short, float(np.median(tokens)), left, quality)


def _quality(measures: list[Measure], retain: Measure, rows: np.ndarray) -> float:
    p = [forget_quality(row_values(measure, RATIO)[rows], row_values(retain, RATIO)[rows]) for measure in measures]
    return float(np.median(p))


def left_behind(outcomes: Outcomes) -> Finding:
    """NPO+RT: what is left of the short rows minus what is left of the long ones."""
    key, text = "short behind", "NPO+RT leaves more of short answers than of long ones (SimNPO paper)"
    found = halves(outcomes)
    if found is None:
        return absent(key, text, MISSING)
    short, long = found.of("npo_rt")
    difference = Interval.of(short, long)
    measured = (
        f"probability above the retain model's: {len(short)} rows of up to {found.tokens:g} tokens {short.mean():+.3f}"
        f", {len(long)} longer ones {long.mean():+.3f}, difference {difference.words()}"
    )
    return Finding(key, Claim(text, measured, difference.positive), _cause(difference, found))


def simnpo_forgets(outcomes: Outcomes) -> Finding:
    """What NPO+RT leaves of the short rows minus what SimNPO+RT leaves of the same rows."""
    key, text = "short SimNPO", "SimNPO+RT forgets more of the short answers than NPO+RT (SimNPO paper)"
    found = halves(outcomes)
    if found is None:
        return absent(key, text, MISSING)
    npo, simnpo = found.of("npo_rt")[0], found.of("simnpo_rt")[0]
    difference = Interval.of(npo - simnpo)
    measured = (
        f"left of short rows, NPO+RT and SimNPO+RT: {npo.mean():+.3f} and {simnpo.mean():+.3f}, difference "
        f"{difference.words()}; {found.qualities()}"
    )
    return Finding(key, Claim(text, measured, difference.positive), _cause(difference, found))


def lead(outcomes: Outcomes) -> Finding:
    """The lead of SimNPO+RT on the short rows minus that on the long ones."""
    key, text = "short lead", "That is due to the length: SimNPO+RT's lead is larger on short answers (SimNPO paper)"
    found = halves(outcomes)
    if found is None:
        return absent(key, text, MISSING)
    short, long = (npo - simnpo for npo, simnpo in zip(found.of("npo_rt"), found.of("simnpo_rt"), strict=True))
    difference = Interval.of(short, long)
    measured = f"lead on short and on long rows: {short.mean():+.3f} and {long.mean():+.3f}, difference "
    return Finding(key, Claim(text, measured + difference.words(), difference.positive), _cause(difference, found))


def _cause(difference: Interval, found: Halves) -> str:
    if difference.positive:
        return ""
    npo, simnpo = (float(found.of(method)[0].mean()) for method in ("npo_rt", "simnpo_rt"))
    if npo <= 0:
        return f"NPO+RT has nothing left of the short rows: {npo:+.3f} against the retain model"
    if difference.positive is None:
        return f"the interval is {difference.high - difference.low:.2g} wide on {len(found.short)} rows"
    return f"SimNPO+RT still has {simnpo:+.3f} of the short rows, NPO+RT {npo:+.3f}"
