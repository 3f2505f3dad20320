"""Runs the stages one after the other, each in a process whose time and exit are monitored.

A stage is forked from this process, which has imported everything and never uses a GPU, so starting a stage needs no
imports. It has its own session, so its child processes are killed with it.
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
START = "start of the stage"  # the failed part if no unit had started


def run(
    stages: list[Stage],
    context: Context,
    journal: Journal,
    say: Callable[[str], None],
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Runs all stages until `context.deadline`; unused time of a stage goes to the later ones."""
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
    """Runs until all units have ended or time is up; after a crash, restarts behind the unit that crashed."""
    while context.left > 0:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(stage, context, journal))
        process.start()
        late = _watch(process, stage.name, context, journal)
        if late is None and process.exitcode == 0:
            return
        unit = journal.running(stage.name)
        if unit is None and process.exitcode != CONTEXT_LOST:
            # outside a unit: it would end the same way again
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
    for number in (1, 2):  # including the output of compilers and drivers
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
    """Waits for the end and kills a late process; then returns (status, reason) for its current unit."""
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
        os.killpg(process.pid, signal.SIGKILL)  # also child processes of a stage that has ended
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
    """Seconds since the process started, imports included: the budget counts from the start of the command."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after boot; field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError):  # not Linux
        return 0.0
