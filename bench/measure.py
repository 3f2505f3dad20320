"""Time and peak memory of one provider on one case, each measured in a process of its own.

A CPU has no allocator statistics worth the name: memory is the peak resident set of the process during one loss with
both gradients, minus what was resident when its inputs were made and its libraries warm. It counts the gradients.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import CASES, Case
from bench.providers import PROVIDERS

MIB = 2**20


@dataclass(frozen=True)
class Job:
    """One provider on one case."""

    case: str
    provider: str
    dtype: str
    device: str
    workspace_mb: float | None
    threads: int
    reps: int


def _step(job: Job, inputs) -> float:
    hidden, weight, *_ = inputs
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    PROVIDERS[job.provider](*inputs, job.workspace_mb).backward()
    if job.device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _peak_resident() -> int:
    """Bytes: the high-water mark of the resident set, since the last reset where the system can reset it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _work(job: Job, connection) -> None:
    torch.set_num_threads(job.threads)
    inputs = CASES[job.case].inputs(getattr(torch, job.dtype), job.device)
    warm: Case = CASES["toy"]
    PROVIDERS[job.provider](*warm.inputs(getattr(torch, job.dtype), job.device), job.workspace_mb).backward()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _reset_peak()
        before = _peak_resident()
    connection.send(("start", None))
    for _ in range(job.reps + 1):
        connection.recv()  # the parent interleaves the providers
        milliseconds = _step(job, inputs)
        peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else _peak_resident()
        connection.send((milliseconds, (peak - before) / MIB))


def interleaved(jobs: list[Job]) -> dict[Job, list[tuple[float, float]]]:
    """(milliseconds, peak MiB) of each repetition of each job, the jobs taking turns; the first turn is warm-up."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        workers[job] = (process, ours)
    for _, ours in workers.values():
        ours.recv()
    results = {job: [] for job in jobs}
    for turn in range(1 + max(job.reps for job in jobs)):
        for job, (_, ours) in workers.items():
            ours.send("go")
            measured = ours.recv()
            if turn > 0:
                results[job].append(measured)
    for process, _ in workers.values():
        process.join()
    return results
