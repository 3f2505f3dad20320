"""SIGTERM, as clusters send it, and Ctrl-C: a checkpoint within seconds, whatever goes on, and the same bits after."""

import signal
import time

import pytest

SECONDS = 20.0  # a hang, on a machine that does other things as well; the summary has how long it took
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PHASES = [
    *[("unlearn", phase) for phase in ("reference", "check", "step", "evaluation", "save")],
    *[("finetune", phase) for phase in ("step", "save")],
    *[("grid", phase) for phase in ("reference", "step", "evaluation")],
    ("evaluate", "evaluation"),
]


def stopped(subject, case, rng, phase, *signals, longest):
    """The end of a run that gets the signals at a random moment of a phase; how many it has got."""
    begins, ends = f"begin {phase}", f"end {phase}"
    which = rng.randrange(len(subject.whole.times(begins)))
    lasts = subject.whole.times(ends)[which] - subject.whole.times(begins)[which]
    run = subject.start(case)
    run.wait_for(begins, which)
    run.process.join(rng.uniform(0, lasts))
    sent, told = 0, time.monotonic()
    for number in signals:
        sent += run.send(number)
        run.process.join(rng.uniform(0, 0.02))
    ended = run.end()
    assert time.monotonic() - told < SECONDS
    longest("seconds from a signal to the end", time.monotonic() - told)
    return ended, sent


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize(("name", "phase"), PHASES)
def test_a_signal_saves_and_the_same_command_goes_on(name, phase, number, subjects, rng, tmp_path, tried, longest):
    subject = subjects[name]
    ended, sent = stopped(subject, tmp_path, rng, phase, number, longest=longest)
    tried(f"{number.name} at random moments", int(sent))
    if ended.code == 0:  # the run had only to write its results
        return
    assert ended.code == CODES[number], f"exit code {ended.code}\n{ended.output}"
    assert "Traceback" not in ended.output and "the same command goes on" in ended.output, ended.output
    steps = len(ended.times("end step"))
    if steps and name in ("unlearn", "finetune"):
        newest = max(path.name for path in tmp_path.glob("run/out/checkpoint-*"))
        done = f"{steps}/{steps} steps" in ended.output  # the run had only to save its model
        assert newest == f"checkpoint-{steps:06d}", ended.output
        assert f"after step {steps};" in ended.output or done, ended.output
    subject.check_resumed(tmp_path)


@pytest.mark.parametrize("phase", ["step", "evaluation", "save"])
def test_the_second_signal_ends_it_at_once_and_nothing_is_lost(phase, subjects, rng, tmp_path, tried, longest):
    subject = subjects["unlearn"]
    ended, sent = stopped(subject, tmp_path, rng, phase, signal.SIGTERM, signal.SIGTERM, longest=longest)
    assert ended.code in (-signal.SIGTERM, CODES[signal.SIGTERM], 0), f"exit code {ended.code}\n{ended.output}"
    tried("two signals, one after another", int(sent == 2))
    subject.check_resumed(tmp_path)
