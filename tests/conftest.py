"""What holds for every test: Triton kernels run in its interpreter, and uninitialised memory can be made to show."""

import os

import torch

# make gpu-check sets NPO_GPU_TESTS=1: there the kernels are compiled
ON_GPU = os.environ.get("NPO_GPU_TESTS") == "1" and torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports one

import collections
import sys
from importlib.util import find_spec

import hypothesis
import pytest

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


def _poisoned(create):
    """`create`, but what npo_kernels allocates with it holds NaN (or a large integer) until it is written."""

    def wrapper(*args, **kwargs):
        made = create(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if type(made) is torch.Tensor and caller.split(".")[0] == "npo_kernels":
            made.detach().fill_(torch.nan if made.is_floating_point() else 2**30)
        return made

    return wrapper


@pytest.fixture
def poisoned_allocations():
    """A result that a kernel forgets to write is NaN instead of whatever the allocator left there."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture
def small_blocks():
    """The torch path cut into blocks that small tests have several of, ragged ones included."""
    from npo_kernels.backends.torch import blocks, rows
    from npo_kernels.core import execute, gradients, matmul

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_V", 64)
        patch.setattr(blocks, "BLOCK_N", 16)
        patch.setattr(blocks, "CACHED_ROWS", 5)
        for name, value in {"BLOCK_K": 24, "BLOCK_M": 24, "COPIED": 700}.items():
            patch.setattr(matmul, name, value)
        for module in (execute, gradients):
            patch.setattr(module, "GRAD_SLICE", 72)
        patch.setattr(rows, "SCALED_ROWS", 72)
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
