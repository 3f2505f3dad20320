"""Random legal calls of every public function, on every implementation, against a float64 oracle: a few hundred a run.

`make fuzz` draws others for as long as it is told to, and shrinks what fails; `kept.py` has what failed once.
"""

import hypothesis
import pytest

from tests.fuzz.calls import FUNCTIONS, random_call
from tests.fuzz.check import check
from tests.fuzz.kept import KEPT

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")
CALLS = {"torch": 26, "triton": 6, "reference": 6}  # of each function; the interpreter is slow


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("impl", CALLS)
def test_drawn_calls(impl, function, tried):
    checked = []

    @hypothesis.settings(max_examples=CALLS[impl])
    @hypothesis.given(hypothesis.strategies.integers(0, 2**32))  # of so few calls none should be small
    def run(seed):
        call = random_call(function, impl, seed)
        checked.append(call)
        hypothesis.note(f"check({call}, {impl!r})")
        check(call, impl)

    run()
    tried(f"fuzzed calls, {impl}", len(checked))


def _impls(call):
    """float64 is for the reference alone."""
    return ("reference",) if call.dtype == "float64" else ("torch", "triton")


@pytest.mark.parametrize(("impl", "call"), [(impl, call) for call in KEPT for impl in _impls(call)], ids=repr)
def test_calls_that_failed_once(impl, call, tried):
    check(call, impl)
    tried(f"kept calls, {impl}")
