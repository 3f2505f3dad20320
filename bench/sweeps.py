"""The common parts of all tile sweeps: the turns, the choice of the winner, the result, and the line of the table."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

from bench.measure import Clock, Failure, failure
from csrc_triton.tiles import Tile
from npo_kernels.backends.tiles import hidden_bucket

MARGIN = 0.02  # a tile has to beat the current entry by this share


class Sweep(TypedDict):
    """The result at one hidden size; tiles are written with `repr`."""

    H: int
    present: str  # the current entry
    suggestion: str | None  # a line of the table
    turns: int
    medians: dict[str, float]  # milliseconds, of the best tiles in turns
    once: dict[str, float]
    failed: dict[str, str]  # error messages


class Times(NamedTuple):
    """Milliseconds: one run of each tile, and medians of the best tiles in turns."""

    once: dict[Tile, float | Failure]
    medians: dict[Tile, float]
    turns: int


def take_turns(
    runs: Mapping[Tile, Sequence[Callable[[], object]]],  # the first tile, the current entry, is always a finalist
    device: str,
    reps: int,
    keep: int = 8,
    seconds: float = math.inf,
) -> Times:
    """Runs every tile once, then the `keep` best in turns; after `seconds` no turn but the first begins. The time of a
    tile is the sum of its runs, each after an untimed run."""
    clock, deadline = Clock(device), time.monotonic() + seconds
    once: dict[Tile, float | Failure] = {}

    def measure(tile: Tile) -> float:
        total = 0.0
        for run in runs[tile]:
            run()
            clock.wait()
            start = clock.mark()
            run()
            end = clock.mark()
            clock.wait()
            total += clock.milliseconds(start, end)
        return total

    for tile in runs:
        try:
            once[tile] = measure(tile)
        except Exception as error:  # out of registers or shared memory, or a compiler error
            once[tile] = failure(error)
    timed = {tile: ms for tile, ms in once.items() if not isinstance(ms, Failure)}
    order = sorted(timed, key=timed.__getitem__)
    finalists: dict[Tile, list[float]] = {
        tile: [] for tile in order if tile == next(iter(runs)) or tile in order[:keep]
    }
    turns = 0
    while turns < reps and (turns == 0 or time.monotonic() < deadline):
        for tile, times in finalists.items():
            times.append(measure(tile))
        turns += 1
    return Times(once, {tile: statistics.median(times) for tile, times in finalists.items()}, turns)


def winner(medians: Mapping[Tile, float], present: Tile) -> Tile:
    """The fastest tile, or the current one unless that is beaten by more than the margin."""
    best = min(medians, key=medians.__getitem__, default=present)
    return best if medians.get(best, math.inf) < (1 - MARGIN) * medians.get(present, math.inf) else present


def outcome(H: int, present: Tile, times: Times, line: Callable[[Tile], str]) -> Sweep:
    """The result to write, with the line of the table if a tile beats the current entry."""
    best = winner(times.medians, present)
    return {
        "H": H,
        "present": repr(present),
        "suggestion": None if best == present else line(best),
        "turns": times.turns,
        "medians": {repr(t): ms for t, ms in sorted(times.medians.items(), key=lambda item: item[1])},
        "once": {repr(t): ms for t, ms in times.once.items() if not isinstance(ms, Failure)},
        "failed": {repr(t): ms.error for t, ms in times.once.items() if isinstance(ms, Failure)},
    }


def key_of(architecture: str, bits: int, hidden_size: int) -> str:
    """The key of the bucket of a hidden size, in every table."""
    return f'("{architecture}", {bits}, {hidden_bucket(hidden_size)})'


def entry(architecture: str, bits: int, hidden_size: int, tile: Tile) -> str:
    """A line of a table of tiles."""
    fields, usual = tile._asdict(), Tile._field_defaults
    values = [repr(value) for name, value in fields.items() if name not in usual]
    options = [(name, value) for name, value in fields.items() if name in usual and value != usual[name]]
    values += [f"{name}={value!r}".replace("'", '"') for name, value in options]
    return f"{key_of(architecture, bits, hidden_size)}: Tile({', '.join(values)}),"
