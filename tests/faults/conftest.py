"""`make faults`: faults in runs of training. NPO_FAULTS=1, which it sets, or the files are not collected."""

import os
import random

import pytest

from tests.faults.runs import use_own_server
from tests.faults.subjects import COMMANDS, Subject, make_home

WANTED = os.environ.get("NPO_FAULTS") == "1"
collect_ignore_glob = [] if WANTED else ["test_*.py"]
SEED = "NPO_FAULTS_SEED"  # how workers of one run share it
LONGEST = "longest: "


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="of the moments, sizes and bits; random if not given")


def pytest_configure(config):
    seed = config.getoption("--seed", None)
    if WANTED and not hasattr(config, "workerinput"):
        os.environ[SEED] = str(random.SystemRandom().randrange(10**6) if seed is None else seed)


def pytest_report_header():
    return f"faults: seed {os.environ[SEED]} (--seed {os.environ[SEED]} for the same)" if WANTED else None


@pytest.fixture
def rng(request):
    """Of this test alone: the same seed gives the same moments in whatever order tests run."""
    return random.Random(f"{os.environ[SEED]} {request.node.nodeid}")


@pytest.fixture(scope="session")
def subjects(tmp_path_factory):
    """{name: the command}"""
    use_own_server()
    folder = tmp_path_factory.mktemp("faults")
    home = make_home(folder / "home", "authors --authors 20 --out data")
    return {name: Subject(name, home, folder) for name in COMMANDS}


@pytest.fixture
def longest(record_property):
    """`longest("seconds until ...", 1.3)`: the summary of the run has the largest."""
    return lambda what, value: record_property(LONGEST + what, value)


def pytest_terminal_summary(terminalreporter):
    largest = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name.startswith(LONGEST):
                name = name.removeprefix(LONGEST)
                largest[name] = max(value, largest.get(name, value))
    if WANTED:
        terminalreporter.section(f"faults, seed {os.environ[SEED]}")
        for name, value in sorted(largest.items()):
            terminalreporter.write_line(f"{value:6.1f} {name}, at most")
