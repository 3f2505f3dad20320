"""What ran and how it ended: a JSON line for each event, written to disk at once, so that it survives a later crash.

planned   the units of a stage, when its process starts
begin     of a unit, with the seconds after which it is killed, and whether that means a hang or only a cut
end       of a unit: its status, seconds, and a text for the report
test      one test of the suite (`pytest_journal`)
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import append, read_lines

PASSED, FAILED, CRASHED, TIMED_OUT = "passed", "failed", "crashed", "timed out"
MISSING, NOT_MEASURED = "missing", "not measured"
BROKEN = (FAILED, CRASHED, TIMED_OUT)


@dataclass(frozen=True)
class Outcome:
    """How a unit of a stage ended. A stage that did not start has one outcome without a unit."""

    stage: str
    unit: str
    status: str
    seconds: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Running:
    """A unit that started and has not ended."""

    unit: str
    since: float  # time.time()
    limit: float  # seconds
    hangs: bool  # if it reaches the limit; otherwise its stage ran out of time


class Journal:
    """A file of events. Processes that write to it take turns."""

    def __init__(self, path: Path):
        self.path = path

    def planned(self, stage: str, units: Iterable[str]) -> None:
        self._write(event="planned", stage=stage, units=list(units))

    def begin(self, stage: str, unit: str, limit: float, hangs: bool = True) -> None:
        self._write(event="begin", stage=stage, unit=unit, limit=limit, hangs=hangs)

    def end(self, stage: str, unit: str, status: str, seconds: float | None = None, detail: str = "") -> None:
        self._write(event="end", stage=stage, unit=unit, status=status, seconds=seconds, detail=detail)

    def test(self, name: str, outcome: str, seconds: float) -> None:
        self._write(event="test", name=name, outcome=outcome, seconds=round(seconds, 2))

    def _write(self, **event: Any) -> None:
        append(self.path, {**event, "time": time.time()})

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.path) if line["event"] == kind]

    def running(self, stage: str) -> Running | None:
        """The unit that a stage is running, or was running when it died."""
        found = None
        for line in read_lines(self.path):
            if line.get("stage") == stage and line["event"] in ("begin", "end"):
                begun = line["event"] == "begin"
                found = Running(*(line[name] for name in ("unit", "time", "limit", "hangs"))) if begun else None
        return found

    def ended(self, stage: str) -> dict[str, Outcome]:
        """The finished units of a stage, in the order in which they ended."""
        fields = ("stage", "unit", "status", "seconds", "detail")
        lines = (line for line in self.events("end") if line["stage"] == stage)
        return {line["unit"]: Outcome(*(line[name] for name in fields)) for line in lines}

    def outcomes(self, stage: str) -> list[Outcome]:
        """The outcome of every planned unit, in order; units that did not end count as not measured."""
        ended = self.ended(stage)
        names = dict.fromkeys(u for line in self.events("planned") if line["stage"] == stage for u in line["units"])
        missing = "the time of the stage was over"
        found = [ended.get(name, Outcome(stage, name, NOT_MEASURED, None, missing)) for name in names]
        return found + [outcome for name, outcome in ended.items() if name not in names]
