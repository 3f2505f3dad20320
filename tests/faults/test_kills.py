"""Killed at random moments of every phase, and at every event of the file system: runs end as if they had not been."""

import re
import shutil
import signal

import pytest

from tests.faults.child import WRITES, Fault

# command, and the marks between which it is killed: each phase of a run, and the whole of it.
PHASES = [
    *[("unlearn", phase) for phase in ("reference", "step", "evaluation", "save")],
    ("finetune", "step"),
    ("evaluate", "evaluation"),
    *[("grid", phase) for phase in ("step", "evaluation", "run")],
]
REPETITIONS, CHUNKS = 5, 8


@pytest.mark.parametrize("repetition", range(REPETITIONS))
@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_killed_in_a_phase(name, phase, repetition, subjects, rng, tmp_path, tried):
    subject = subjects[name]
    begins, ends = ("start", "end") if phase == "run" else (f"begin {phase}", f"end {phase}")
    which = rng.randrange(len(subject.whole.times(begins)))
    lasts = subject.whole.times(ends)[which] - subject.whole.times(begins)[which]
    run = subject.start(tmp_path)
    run.wait_for(begins, which)
    run.process.join(rng.uniform(0, lasts))
    if run.send(signal.SIGKILL):
        tried(f"kills at random moments: {name}, {phase}")
    killed = run.end()
    assert killed.code in (-signal.SIGKILL, 0), killed.output
    resumed = subject.check_resumed(tmp_path)
    if name != "grid":
        check_nothing_is_done_again(killed, resumed)


def check_nothing_is_done_again(killed, resumed):
    """Of the steps that were saved: after each of them there is a checkpoint at any moment."""
    if saved := len(killed.times("end save")):
        assert re.search(f"resuming after step [{saved}-9]|is finished", resumed.output), resumed.output


@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate", "grid"])
def test_killed_again_and_again(name, subjects, rng, tmp_path, tried):
    """Until it ends: each run goes a random way, and leaves more than the one before, or as much."""
    subject, kills = subjects[name], 0
    lasts = subject.whole.marks[-1].time - subject.whole.marks[0].time
    code = None
    while code != 0 and kills < 8:
        run = subject.start(tmp_path)
        run.wait_for("start")
        run.process.join(rng.uniform(0.2, 1.0) * lasts)
        kills += run.send(signal.SIGKILL)
        code = run.end().code
        assert code in (0, -signal.SIGKILL)
    tried(f"kills one after another: {name}", kills)
    subject.check_resumed(tmp_path)


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize(("name", "how"), [("unlearn", "before"), ("unlearn", "torn"), ("finetune", "before")])
def test_killed_at_every_event(name, how, chunk, subjects, rng, tmp_path, tried):
    """Between writing and renaming, during a removal, with a file partly written or still empty."""
    subject, failures = subjects[name], []
    events = list(enumerate(subject.whole.events))
    if how == "torn":
        events = [(k, event) for k, event in events if event.split()[0] in WRITES]
    for k, event in events[chunk::CHUNKS]:
        case = tmp_path / f"{k}"
        ended = subject.run(case, Fault(k, how, size=rng.choice([0, 1, 7, 60, 400, 3000])))
        assert ended.code in ((-signal.SIGXFSZ, 0) if how == "torn" else (-signal.SIGKILL,)), ended.output
        what = "kills within a write" if how == "torn" else "kills before an event of the file system"
        tried(f"{what}: {name}", int(ended.code != 0))
        try:
            check_nothing_is_done_again(ended, subject.check_resumed(case))
        except AssertionError as error:
            failures.append(f"{how} event {k}, {event}: {error}")
        shutil.rmtree(case)
    assert not failures, "\n\n".join(failures)
