"""A pytest plugin that writes the outcome of each test into the journal as it ends. `-p
bench.certify.pytest_journal`."""

import os
from pathlib import Path

import pytest

from bench.certify.journal import Journal
from bench.certify.tests import VARIABLE


class _Recorder:
    def __init__(self, journal: Journal):
        self.journal = journal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # setup and teardown only if they failed or were skipped
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            self.journal.test(report.nodeid, report.outcome, report.duration)


def pytest_configure(config: pytest.Config) -> None:
    # with several processes, the one that distributes the tests receives all outcomes
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(Journal(Path(os.environ[VARIABLE]))))
