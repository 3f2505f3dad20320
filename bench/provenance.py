"""Which commit a measurement is of. A result that cannot be traced to one is worth nothing."""

import os
import subprocess
from functools import cache
from pathlib import Path

# Names the commit where the files travelled without their history, to a machine without a network for instance.
VARIABLE = "NPO_BENCH_COMMIT"
ROOT = Path(__file__).resolve().parents[1]
# What measuring itself writes: a second suite may be run before the first one's results are committed.
WRITTEN = (":(exclude)*/results/*", ":(exclude)bench/RESULTS.md")


def commit() -> str:
    """The short hash of the commit measured, with "-dirty" behind it where the files differ; or "unknown"."""
    return os.environ.get(VARIABLE) or _described()


def refusal(allow_dirty: bool) -> str | None:
    """Why results must not be taken from these files, and what to do; None where they may."""
    found = commit()
    if found == "unknown":
        return f"no commit can be named: there is no git checkout here. Set {VARIABLE} to the commit of these files"
    if found.endswith("-dirty") and not allow_dirty:
        return f"the files differ from commit {found.removesuffix('-dirty')}: commit them first, or say --allow_dirty"
    return None


@cache
def _described() -> str:
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
