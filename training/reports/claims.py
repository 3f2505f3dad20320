"""Claims of papers compared with measured numbers, and text that the reports of papers share."""

import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
WORDS = {True: "agrees", False: "**does not agree**", None: "cannot tell"}


class Claim(NamedTuple):
    text: str  # as the paper has it
    measured: str
    holds: bool | None  # None: the seeds are too few or too far apart to tell


class Difference(NamedTuple):
    """Of pairs, over the seeds, with Student's interval."""

    mean: float
    half: float  # of the interval; infinite with one seed

    @classmethod
    def of(cls, values: np.ndarray) -> "Difference":
        n = len(values)
        half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1) / n**0.5 if n > 1 else np.inf
        return cls(float(values.mean()), float(half))

    @property
    def positive(self) -> bool | None:
        """None if the interval contains 0."""
        return None if abs(self.mean) <= self.half else self.mean > 0

    def words(self) -> str:
        return f"{self.mean:+.3f} [{self.mean - self.half:+.3f}, {self.mean + self.half:+.3f}]"


def filled(paragraph: str) -> str:
    """Wrap text to lines of 120 characters."""
    return textwrap.fill(paragraph, 120, break_on_hyphens=False)


def versions_sentence(versions: Mapping[str, str]) -> str:
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
