"""A sample of `make faults`: a run that was stopped in six ways, one after another, ends with the same bits."""

import random
import signal

import pytest

from tests.faults.child import Fault
from tests.faults.runs import stop_server, use_own_server
from tests.faults.subjects import Subject, make_home


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    use_own_server()
    folder = tmp_path_factory.mktemp("kills")
    yield Subject("unlearn", make_home(folder / "home"), folder)
    stop_server()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_bits(subject, tmp_path, tried):
    """While it scores, saves and evaluates, within a write, before a rename, by SIGTERM and by Ctrl-C."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown where the test fails
    rng = random.Random(seed)
    ends = []
    for phase, number in (
        ("reference", signal.SIGKILL),
        ("evaluation", signal.SIGTERM),
        ("save", signal.SIGKILL),
        ("evaluation", signal.SIGINT),
    ):
        run = subject.start(tmp_path)
        assert run.wait_for(f"begin {phase}")
        run.process.join(rng.uniform(0, 0.02))
        assert run.send(number)
        ends.append(run.end())
        if phase == "reference":  # the run after next to nothing has events enough
            ends += [subject.run(tmp_path, Fault(rng.randrange(20, 80), how, size=9)) for how in ("before", "torn")]
    codes = [ended.code for ended in ends]
    assert codes == [-9, -9, -signal.SIGXFSZ, 143, -9, 130], "\n".join(ended.output for ended in ends)
    tried("kills of runs", len(codes))
    subject.check_resumed(tmp_path)
