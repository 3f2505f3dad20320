"""Tests as units: pytest in the process of the stage, its outcomes in the journal one by one."""

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
# the second call in a process finds the plugin imported
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def run_tests(context: Context, arguments: Sequence[str]) -> str:
    """What pytest counted; raises where a test failed, or none passed."""
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
        raise UnsupportedError(counted)  # to skip is not to pass
    return counted
