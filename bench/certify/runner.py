"""The stages one after the other, each in a process of its own that is watched: by the clock, and by how it ends.

A stage is forked from this process, which has imported everything and never touches a GPU, so that a start costs no
import. It has a session of its own: what it starts is killed with it.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bench.certify.journal import CRASHED, NOT_MEASURED, TIMED_OUT, Journal, Outcome
from bench.certify.schedule import Stage, allotment
from bench.certify.unit import CONTEXT_LOST, Context, work

POLL = 0.1  # seconds
START = "start of the stage"  # what failed where no unit had begun


def run(
    stages: list[Stage],
    context: Context,
    journal: Journal,
    say: Callable[[str], None],
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """All stages in what is left until `context.deadline`; what a stage does not use is left to the later ones."""
    for number, stage in enumerate(stages):
        seconds = allotment(stages[number:], context.left)[stage.name]
        if seconds < stage.least:
            why = f"needs at least {stage.least:.0f} s, {max(0, seconds):.0f} s were left to it"
            journal.end(stage.name, "", NOT_MEASURED, None, why)
            say(f"{stage.name}: {NOT_MEASURED}, {why}")
            continue
        start = time.monotonic()
        run_stage(stage, replace(context, deadline=start + seconds), journal)
        say(f"{stage.name}: {counts(journal.outcomes(stage.name))}; {time.monotonic() - start:.0f} of {seconds:.0f} s")
        after_each()


def run_stage(stage: Stage, context: Context, journal: Journal) -> None:
    """Until all units have ended or the time is over; begun again behind a unit that its process did not survive."""
    while context.left > 0:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(stage, context, journal))
        process.start()
        late = _watch(process, stage.name, context, journal)
        if late is None and process.exitcode == 0:
            return
        unit = journal.running(stage.name)
        if unit is None and process.exitcode != CONTEXT_LOST:
            # not in a unit: it would end in the same way again
            status, why = late or (CRASHED, how_it_ended(process.exitcode))
            journal.end(stage.name, START, status, None, why)
            return
        if unit is not None:
            status, why = late or (CRASHED, how_it_ended(process.exitcode))
            journal.end(stage.name, unit.unit, status, round(time.time() - unit.since, 1), why)


def _child(stage: Stage, context: Context, journal: Journal) -> None:
    """The process of a stage."""
    os.setsid()
    log = os.open(context.out / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in (1, 2):  # what compilers and drivers print, too
        os.dup2(log, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.enable()
    code = 1
    try:
        code = work(stage.name, stage.units(context), context, journal)
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # tearing down a broken CUDA context can hang


def _watch(process, stage: str, context: Context, journal: Journal) -> tuple[str, str] | None:
    """Wait for the end, and bring it about where it is late: then (status, why) of what it was doing."""
    late = None
    while process.is_alive() and late is None:
        process.join(POLL)
        unit = journal.running(stage)
        if unit is not None and time.time() - unit.since > unit.limit:
            killed = f"killed after {unit.limit:.0f} s"
            late = (TIMED_OUT, killed) if unit.hangs else (NOT_MEASURED, f"{killed}, for want of time")
        elif context.left < 0:
            late = NOT_MEASURED, "killed at the end of the stage's time"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what a stage that ended has left running
    process.kill()
    process.join(10)
    if process.is_alive():
        return TIMED_OUT, "cannot be killed: the device does not let go of it"
    return late


def how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def counts(outcomes: list[Outcome]) -> str:
    """Such as "12 passed, 1 failed"."""
    statuses = [outcome.status for outcome in outcomes]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)) or "nothing ran"


def since_start_of_process() -> float:
    """Seconds, the imports included: a budget counts from when the command was typed."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after boot; field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError):  # not Linux
        return 0.0
