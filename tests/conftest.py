"""What holds for every test: Triton kernels run in its interpreter, and uninitialised memory can be made to show."""

import os

import torch

# make gpu-check sets NPO_GPU_TESTS=1: there the kernels are compiled
ON_GPU = os.environ.get("NPO_GPU_TESTS") == "1" and torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports one

import collections
from importlib.util import find_spec

import hypothesis
import pytest

from tests import patches

if find_spec("triton") is not None:
    import triton

    assert bool(triton.knobs.runtime.interpret) != ON_GPU, "TRITON_INTERPRET was set after Triton had read it"
    if not ON_GPU:
        from tests import interpreter

        interpreter.adjust()

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,  # a test that passed once passes again
    deadline=None,  # the interpreter is slow the first time
    database=None,
    print_blob=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # --hypothesis-profile=shrink takes minutes
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "shrink", parent=hypothesis.settings.get_profile("repeatable"), phases=tuple(hypothesis.Phase)
)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Without Triton, tests with a parameter "triton" skip."""
    if find_spec("triton") is not None:
        return
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters and any(isinstance(value, str) and value == "triton" for value in parameters.params.values()):
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))


@pytest.fixture
def poisoned_allocations():
    """`tests.patches.poisoned_allocations` for a test."""
    with patches.poisoned_allocations():
        yield


@pytest.fixture
def small_blocks():
    """`tests.patches.small_blocks` for a test."""
    with patches.small_blocks():
        yield


@pytest.fixture
def plans(monkeypatch):
    """The plans made during the test, in order: what mode really ran."""
    from npo_kernels.core import task

    made = []
    make_plan = task.make_plan

    def spy(**sizes):
        made.append(make_plan(**sizes))
        return made[-1]

    monkeypatch.setattr(task, "make_plan", spy)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# How much was tried: a test that draws many cases says how many, and the end of the run has the sums
# ---------------------------------------------------------------------------------------------------------------------

COUNT = "count: "


@pytest.fixture
def tried(record_property):
    """`tried("fuzzed calls", 40)`: the summary of the run adds these up, over all tests and workers."""
    return lambda what, number=1: record_property(COUNT + what, number)


def pytest_terminal_summary(terminalreporter):
    sums = collections.Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name.startswith(COUNT) and report.when == "call":
                sums[name.removeprefix(COUNT)] += value
    if sums:
        terminalreporter.section("tried")
        for what, number in sorted(sums.items()):
            terminalreporter.write_line(f"{number:6d} {what}")
