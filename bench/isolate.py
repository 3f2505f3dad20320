"""Time and peak memory of steps, each in a process of its own; the processes take turns.

A CPU has no useful allocator statistics, so its memory is the peak resident set during a step minus the resident set
before. With `whole=False`, "before" means after the inputs are made and the libraries are warm: the difference is
workspace and gradients. With `whole=True` it means before anything is made.
"""

import math
import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch

from bench.measure import Failure, failure

MIB = 2**20


class Turn(NamedTuple):
    """One run of a step."""

    milliseconds: float
    peak_mb: float
    answer: int | None  # what the step returned, if it was a number


class Job(Protocol):
    """The argument of a process; can be pickled and hashed."""

    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def warmup(self) -> int: ...
    @property
    def reps(self) -> int: ...
    @property
    def whole(self) -> bool: ...
    @property
    def limit(self) -> float:
        """Seconds that one turn may take; also, no turn begins after the turns of a job have taken this long."""

    @property
    def patience(self) -> float:
        """Additional seconds for the first turn, which may compile."""

    def prepare(self) -> Callable[[], object]:
        """Make the inputs and warm up the libraries, in the new process; returns the step."""


AnyJob = TypeVar("AnyJob", bound=Job)


def peak_resident() -> int:
    """Bytes: the high-water mark of the resident set since the last reset, or ever if the system cannot reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def memory(device: str, reset: bool) -> int:
    """Bytes at the peak since the last reset; with `reset` a new peak begins now."""
    if not device.startswith("cuda"):
        if reset:
            reset_peak()
        return peak_resident()
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def _work(job: Job, connection) -> None:
    try:
        if job.threads:
            torch.set_num_threads(job.threads)
        before = memory(job.device, reset=True)
        step = job.prepare()
        if not job.whole:
            before = memory(job.device, reset=True)
        connection.send("ready")
        while connection.recv() == "go":
            memory(job.device, reset=True)
            start = time.perf_counter()
            answer = step()
            if job.device.startswith("cuda"):
                torch.cuda.synchronize()
            milliseconds = 1e3 * (time.perf_counter() - start)
            peak_mb = (memory(job.device, reset=False) - before) / MIB
            answer = answer if isinstance(answer, int) else None
            connection.send(Turn(milliseconds, peak_mb, answer))
    except EOFError:
        pass  # the parent is gone
    except BaseException as error:
        connection.send(failure(error))
        if not isinstance(error, Exception):
            traceback.print_exc()


@cache
def start_context() -> SpawnContext | ForkServerContext:
    """Processes that share only imported modules: forked from a server that has run no other code."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory", "bench.suites.step", "bench.report"])
    return context


class Worker:
    """A process with one job."""

    def __init__(self, job: Job):
        context = start_context()
        self.failure: Failure | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._receive()  # "ready"

    def _receive(self, seconds: float | None = None):
        try:
            if seconds is not None and not self.connection.poll(seconds):
                self.process.kill()
                self.failure = Failure("slow", f"more than {seconds:g} s")
                return self.failure
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            answer = Failure("oom" if self.process.exitcode == -9 else "failed", f"ended with {self.process.exitcode}")
        if isinstance(answer, Failure):
            self.failure = answer
        return answer

    def step(self, seconds: float) -> Turn | Failure:
        self.connection.send("go")
        return self._receive(None if math.isinf(seconds) else seconds)

    def stop(self) -> None:
        if self.process.is_alive() and self.failure is None:
            self.connection.send("stop")
        self.process.join(timeout=60)
        self.connection.close()


def take_turns(jobs: Iterable[AnyJob], together: bool = True) -> dict[AnyJob, list[Turn] | Failure]:
    """The turns of each job after its warm-up. `together`: all processes exist at once; otherwise one after the
    other."""
    jobs = list(jobs)
    if not together:
        return {job: turns for job in jobs for turns in take_turns([job]).values()}
    turns: dict[AnyJob, list[Turn]] = {job: [] for job in jobs}
    spent = dict.fromkeys(jobs, 0.0)
    workers = {job: Worker(job) for job in jobs}
    for number in range(max((job.warmup + job.reps for job in jobs), default=0)):
        for job, worker in workers.items():
            done = len(turns[job]) >= job.reps or (turns[job] and spent[job] > job.limit)
            if worker.failure is not None or done:
                continue
            measured = worker.step(job.limit + (0 if number else job.patience))
            if isinstance(measured, Failure):
                continue
            seconds = measured.milliseconds / 1e3
            if number >= job.warmup or (seconds > job.limit / 3 and not job.patience):
                turns[job].append(measured)  # a turn this long needs no warm-up
            spent[job] += seconds if number or not job.patience else 0.0
    for worker in workers.values():
        worker.stop()
    return turns | {job: worker.failure for job, worker in workers.items() if worker.failure is not None}
