"""One provider on one case, in a process of its own: the job that `isolate.py` runs for time and peak memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench.cases import HEADS, Batch, Case, even
from bench.isolate import MIB, memory, take_turns
from bench.measure import WHOLE, Failure, described, failure, release
from bench.options import Options
from bench.providers import PROVIDERS, plan_of
from bench.records import Record, record, summary

COMPILING = 90.0  # seconds


@dataclass(frozen=True)
class LossJob:
    """Loss and gradients of the mode, once a turn."""

    provider: str
    case: Case
    dtype: str
    device: str
    mode: str
    threads: int | None
    reps: int
    warmup: int = 1
    whole: bool = False
    limit: float = math.inf

    @property
    def patience(self) -> float:
        return COMPILING if PROVIDERS[self.provider].compiles else 0.0

    def prepare(self) -> Callable[[], object]:
        self.try_out()
        batch = self.case.batch(getattr(torch, self.dtype), self.device, self.mode)
        return lambda: PROVIDERS[self.provider].step(batch)

    def try_out(self) -> None:
        """Runs a small batch of the same kind: raises the provider's errors, and warms up its libraries."""
        small = even("small", HEADS["toy"]._replace(softcap=self.case.head.softcap), 32, 2)
        PROVIDERS[self.provider].step(small.batch(getattr(torch, self.dtype), self.device, self.mode))


def attempt(job: LossJob) -> Failure | None:
    """The reason not to start a process for the job, or None."""
    try:
        job.try_out()
    except Exception as error:  # whatever a peer raises is its result
        why = failure(error)
        return why if why.status in ("missing", "unsupported") else None
    return None


def peak_of(options: Options, case: Case, name: str, batch: Batch) -> Record:
    """Peak MiB of one provider in this process, libraries warm. For GPUs: the allocator's counts are exact in any
    process."""
    common = described(options, case, name, batch.mode) | {"what": WHOLE[batch.mode], "metric": "peak_mb"}
    try:
        before = memory(options.device, reset=True)
        PROVIDERS[name].step(batch)
        peak = (memory(options.device, reset=False) - before) / MIB
    except Exception as error:  # whatever a peer raises is its result
        why = failure(error)
        release(batch.hidden.is_cuda)
        return record(options.device, **common, status=why.status, error=why.error)
    plan = plan_of(name, batch)
    return record(options.device, **common, plan=None if plan is None else str(plan), **summary([peak]))


def isolated(
    options: Options,
    cases: Iterable[Case],
    modes: Iterable[str] = ("full",),
    times: bool = False,
    reps: int = 3,
    **fields,
) -> Iterator[Record]:
    """Peak MiB beyond the inputs, gradients included, of every provider; with `times` the milliseconds as well."""
    for case in cases:
        for mode in modes:
            jobs = {
                LossJob(
                    name, case, options.dtype, options.device, mode, options.threads, reps, limit=options.seconds
                ): name
                for name in options.provider_names
            }
            hopeless = {job: why for job in jobs if (why := attempt(job)) is not None}
            results = hopeless | take_turns([job for job in jobs if job not in hopeless], together=times)
            for job in jobs:
                turns = results[job]
                common = described(options, case, jobs[job], mode) | {"what": WHOLE[mode]} | fields
                common["threads"] = options.threads
                if isinstance(turns, Failure):
                    common |= {"metric": "ms" if times else "peak_mb", "status": turns.status, "error": turns.error}
                    common["over_ms"] = 1e3 * options.seconds if turns.status == "slow" else None
                    yield record(options.device, **common)
                    continue
                plan = plan_of(jobs[job], case.unfilled(options.torch_dtype, options.device, mode))
                common["plan"] = None if plan is None else str(plan)
                milliseconds, peaks, _ = zip(*turns, strict=True)
                if times:
                    yield record(options.device, **common, metric="ms", **summary(milliseconds))
                yield record(options.device, **common, metric="peak_mb", **summary(peaks))
