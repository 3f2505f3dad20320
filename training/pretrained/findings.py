"""The outcome of testing a claim: a verdict, the numbers, and the reason if it fails or cannot be decided."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from training.reports.claims import CONFIDENCE, WORDS, Claim

RESAMPLES = 2000
NOT_MEASURED = "not measured"


class Finding(NamedTuple):
    key: str  # of what a headline asks for, such as "collapse, forget10"
    claim: Claim
    cause: str = ""
    records: bool = True  # there are records that could tell

    @property
    def word(self) -> str:
        return WORDS[self.claim.holds] if self.records else NOT_MEASURED


def absent(key: str, text: str, missing: str) -> Finding:
    return Finding(key, Claim(text, "", None), f"no record of {missing}", records=False)


def all_of(parts: Iterable[bool | None]) -> bool | None:
    """False if one part fails, True if all hold, else None."""
    parts = list(parts)
    return False if False in parts else None if None in parts else True


def by_count(held: np.ndarray) -> bool | None:
    """(seeds,) bool -> whether all or none hold; None where the seeds do not agree."""
    return True if held.all() else None if held.any() else False


class Interval(NamedTuple):
    """A mean over rows, with the quantiles of the means of resampled rows."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, *parts: np.ndarray, seed: int = 0) -> "Interval":
        """Of the mean of the first part minus those of the others, each (rows,), resampled by itself."""
        rng = np.random.default_rng(seed)
        signs = [1, *[-1] * (len(parts) - 1)]
        mean = sum(sign * part.mean() for sign, part in zip(signs, parts, strict=True))
        drawn = sum(
            sign * part[rng.integers(len(part), size=(RESAMPLES, len(part)))].mean(axis=1)
            for sign, part in zip(signs, parts, strict=True)
        )
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return cls(float(mean), float(low), float(high))

    @property
    def positive(self) -> bool | None:
        """None if the interval contains 0."""
        return None if self.low <= 0 <= self.high else self.low > 0

    def words(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
