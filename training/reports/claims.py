"""A paper's statements beside the numbers that were measured, and the lines that the reports of papers share."""

import textwrap
from collections.abc import Mapping
from typing import NamedTuple


class Claim(NamedTuple):
    text: str  # as the paper has it
    measured: str
    holds: bool | None  # None: the seeds are too few or too far apart to tell


def filled(paragraph: str) -> str:
    """In lines of 120 characters."""
    return textwrap.fill(paragraph, 120, break_on_hyphens=False)


def versions_sentence(versions: Mapping[str, str]) -> str:
    return "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
