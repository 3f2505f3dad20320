"""A unit is the smallest part whose result can be lost: it runs in the process of its stage and may raise, crash or
hang.

`work` is the main function of that process. If it dies, the runner records the reason and restarts it after the unit
that killed it: earlier results are kept, and later units still run."""

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.certify.journal import FAILED, MISSING, NOT_MEASURED, PASSED, Journal
from bench.measure import failure
from bench.options import Options, default_reps, default_threads
from bench.records import Record, append, read

CONTEXT_LOST = 3  # exit code after a persistent CUDA error: this process cannot measure any more


@dataclass
class Context:
    """The shared state of the units of a stage."""

    out: Path  # folder
    toy: bool  # the rehearsal: tiny shapes on a CPU, Triton's kernels interpreted
    deadline: float  # time.monotonic()
    data_dir: Path | None = None
    kept: dict[str, Any] = field(default_factory=dict)  # set by units for later ones of the same process

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def records(self) -> list[Record]:
        """The records so far, of all stages."""
        path = self.out / "records.jsonl"
        return read(path) if path.exists() else []

    def emit(self, records: Iterable[Record]) -> list[Record]:
        """Writes each record to disk as it arrives."""
        found = []
        for record in records:
            append(self.out / "records.jsonl", record)
            found.append(record)
        return found

    def options(self, suite: str, **others: Any) -> Options:
        """Options for the suites that the units call."""
        reps, warmup = (1, 0) if self.toy else default_reps(self.device, self.toy)
        options = Options(
            suite,
            self.device,
            "bfloat16",
            toy=self.toy,
            reps=reps,
            warmup=warmup,
            threads=default_threads(),
            data_dir=self.data_dir,
        )
        return replace(options, **others)


@dataclass(frozen=True)
class Unit:
    """`run` writes its records through the context and returns the text for the report."""

    name: str
    run: Callable[[Context], str | None]
    seconds: float  # expected on an H100 with nothing compiled; with less time left it is not started
    limit: float | None = None  # seconds after which it is killed
    reserve: float = 0.0  # seconds that it leaves to the later units

    def kill_after(self, left: float) -> tuple[float, bool]:
        """(seconds until the unit is killed, whether reaching them means a fault); the stage has `left` seconds."""
        own = 20 + 3 * self.seconds if self.limit is None else self.limit
        cut = max(self.seconds, left - self.reserve)
        return min(own, cut), own <= cut


def work(stage: str, units: Iterable[Unit], context: Context, journal: Journal) -> int:
    """Runs the units that have not ended yet, in order; returns the exit code of the process."""
    units = list(units)
    journal.planned(stage, [unit.name for unit in units])
    done = journal.ended(stage)
    for unit in units:
        if unit.name in done:
            continue
        needed = 1 if context.toy else unit.seconds + unit.reserve
        if context.left < needed:
            why = f"needs about {needed:.0f} s of the stage, {max(0, context.left):.0f} s were left"
            journal.end(stage, unit.name, NOT_MEASURED, None, why)
            continue
        journal.begin(stage, unit.name, *unit.kill_after(context.left))
        print(f"--- {stage}: {unit.name}", flush=True)
        start = time.monotonic()
        try:
            detail, status = unit.run(context) or "", PASSED
        except Exception as error:  # a unit's failure is its result
            traceback.print_exc()
            found = failure(error)
            status = MISSING if found.status in ("missing", "unsupported") else FAILED
            detail = found.error
        journal.end(stage, unit.name, status, round(time.monotonic() - start, 2), detail)
        if not context.toy and not _alive():
            return CONTEXT_LOST
    return 0


def _alive() -> bool:
    """Whether the device responds: after an illegal memory access every call fails until the process ends."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
