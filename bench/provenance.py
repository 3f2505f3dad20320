"""The commit that is measured. A result that cannot be traced to a commit has no value."""

import os
import subprocess
from functools import cache
from pathlib import Path

# Names the commit when the files were copied without their git history, for example to a machine without a network.
VARIABLE = "NPO_BENCH_COMMIT"
ROOT = Path(__file__).resolve().parents[1]
# Files that a measurement writes: a second suite may run before the results of the first are committed.
WRITTEN = (":(exclude)*/results/*", ":(exclude)bench/RESULTS.md")


def commit() -> str:
    """The short hash of the commit, with the suffix "-dirty" if files differ from it; or "unknown"."""
    return os.environ.get(VARIABLE) or _described()


def refusal(allow_dirty: bool) -> str | None:
    """Why results must not be recorded from these files, and what to do; None if they may."""
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
    """The output of git; None if it fails or is not installed."""
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
