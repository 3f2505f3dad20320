"""A unit is the least that can be lost: run in the process of its stage, it may raise, crash or hang.

`work` is what that process does. Where it dies, the runner enters why, and starts it again behind the unit that killed
it: what was measured before stays, and what comes after has its turn.
"""

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

CONTEXT_LOST = 3  # exit code: after a CUDA error that stays, this process can measure nothing more


@dataclass
class Context:
    """What the units of a stage share."""

    out: Path  # folder
    toy: bool  # the rehearsal: tiny shapes on a CPU, Triton's kernels interpreted
    deadline: float  # time.monotonic()
    data_dir: Path | None = None
    kept: dict[str, Any] = field(default_factory=dict)  # by units for later ones of the same process

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def records(self) -> list[Record]:
        """Measured so far, by all stages."""
        path = self.out / "records.jsonl"
        return read(path) if path.exists() else []

    def emit(self, records: Iterable[Record]) -> list[Record]:
        """Each on the disk as it comes."""
        found = []
        for record in records:
            append(self.out / "records.jsonl", record)
            found.append(record)
        return found

    def options(self, suite: str, **others: Any) -> Options:
        """Of the suites that the units call."""
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
    """`run` writes its records through the context and returns what the report is to say."""

    name: str
    run: Callable[[Context], str | None]
    seconds: float  # expected of an H100 that has compiled nothing; where less is left it is not begun
    limit: float | None = None  # seconds after which it is killed
    reserve: float = 0.0  # seconds that it leaves to the units behind it

    def kill_after(self, left: float) -> tuple[float, bool]:
        """(seconds, whether something must be wrong with a unit that takes as long); `left` to the stage."""
        own = 20 + 3 * self.seconds if self.limit is None else self.limit
        cut = max(self.seconds, left - self.reserve)
        return min(own, cut), own <= cut


def work(stage: str, units: Iterable[Unit], context: Context, journal: Journal) -> int:
    """Run the units that have not ended yet, one after the other; returns the exit code of the process."""
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
    """Whether the device answers: after an illegal memory access every call fails until the process ends."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
