"""Tests as units: pytest runs in the process of the stage, and each outcome goes into the journal."""

import os
from collections.abc import Sequence

from bench.certify.journal import Journal
from bench.certify.unit import Context
from bench.providers import UnsupportedError

VARIABLE = "NPO_CERTIFY_JOURNAL"  # path of the journal, for pytest_journal.py
MAX_FAILURES = 10
OPTIONS = (
    "-q",
    "--tb=short",
    f"--maxfail={MAX_FAILURES}",
    "-p",
    "no:cacheprovider",
    "-p",
    "bench.certify.pytest_journal",
)
# in a second call the plugin is already imported
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def run_tests(context: Context, arguments: Sequence[str]) -> str:
    """Pytest's counts; raises if a test failed or none passed."""
    import pytest

    journal = Journal(context.out / "journal.jsonl")
    os.environ[VARIABLE] = str(journal.path)
    before = len(journal.events("test"))
    code = pytest.main([*OPTIONS, *arguments])
    events = journal.events("test")[before:]
    found = [event["outcome"] for event in events]
    counted = ", ".join(f"{found.count(outcome)} {outcome}" for outcome in dict.fromkeys(found)) or "no test ran"
    failed = [event["name"].rpartition("::")[2] for event in events if event["outcome"] == "failed"]
    if code != 0:
        which = f": {', '.join(failed[:3])}" if failed else f", pytest ended with {int(code)}"
        raise AssertionError(f"{counted}{which}")
    if "passed" not in found:
        raise UnsupportedError(counted)  # skipped tests did not pass
    return counted
