"""Two runs at a time: on one reference cache, and in one folder, where the second is refused, or finds it finished."""

import signal
import time

import pytest

from tests.faults.runs import Run, check_refused
from tests.faults.subjects import contents, differences

IN_USE = r"another (process|run)|in use|is running|writes to"


@pytest.mark.parametrize("repetition", range(10))
def test_one_cache(repetition, subjects, rng, tmp_path, tried):
    """Both end with the bits of one alone, though both find it empty, or one half of it; one of them may be killed."""
    subject = subjects["unlearn"]
    runs, kill = [], repetition >= 7
    reached = rng.uniform(0, 0.6) * (subject.whole.times("begin step")[0] - subject.whole.marks[0].time)
    for place in ("a", "b"):
        runs.append(Run(subject.command(), tmp_path / place))
        runs[0].wait_for("start")
        if place == "a":
            time.sleep(reached)
    if kill:
        runs[0].wait_for("begin reference")
        time.sleep(rng.uniform(0, 0.05))
        runs[0].send(signal.SIGKILL)
    codes = [run.end() for run in runs]
    assert codes[1].code == 0 and codes[0].code in (0, -signal.SIGKILL), "\n".join(ended.output for ended in codes)
    expected = {name.removeprefix("run/"): value for name, value in subject.expected.items()}
    cache = contents(tmp_path / "cache")
    assert not differences({f"cache/{name}": value for name, value in cache.items()}, only(expected, "cache/"))
    for place, ended in zip(("a", "b"), codes, strict=True):
        if ended.code == 0:
            found = {f"out/{name}": value for name, value in contents(tmp_path / place / "out").items()}
            assert not differences(found, only(expected, "out/")), place
    tried("pairs of runs with one cache")


def only(found, start):
    return {name: value for name, value in found.items() if name.startswith(start)}


@pytest.mark.parametrize("repetition", range(4))
@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate", "grid"])
def test_one_folder(name, repetition, subjects, rng, tmp_path, tried):
    subject = subjects[name]
    lasts = subject.whole.marks[-1].time - subject.whole.marks[0].time
    first = subject.start(tmp_path)
    first.wait_for("start")
    time.sleep(rng.uniform(0, 0.9) * lasts if repetition else 0.0)
    second = subject.start(tmp_path)
    ends = [first.end(), second.end()]
    assert 0 in [ended.code for ended in ends], "\n".join(ended.output for ended in ends)
    worked = [ended for ended in ends if ended.times("begin step") or ended.times("begin evaluation")]
    assert len(worked) == 1, "\n".join(ended.output for ended in ends)
    for ended in ends:
        if ended.code:
            check_refused(ended, IN_USE, "--out")
            tried("second runs on one folder that are refused")
    tried("pairs of runs on one folder")
    subject.check_resumed(tmp_path)
