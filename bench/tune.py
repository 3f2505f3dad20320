"""Sweep the tiles of the projection kernels on the GPU at hand, and enter what wins in csrc_triton/tiles.py.

For (architecture, dtype, H): every candidate is compiled and timed, storing the exponentials and not, at the N of a
large batch and the vocabulary given; then the best ones in turns with the entry in force. Where the GPU has tensor
descriptors (sm_90 and later), persistent tiles are candidates like others. What does not fit fails and is listed.

A hidden size stands for its bucket (`npo_kernels.backends.tiles`). One that beats the entry in force by more than a
margin is printed, and with --write it is entered in the table, beside the name of the result file: to be read, compiled
ahead of time (tests/aot) and committed, for a new tile changes the bits of the log-probabilities. Nothing is tuned at
import or at a first call. Tiles never depend on N.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cases import Case, Head, head_case
from bench.measure import Clock, Failure, failure
from bench.providers.kernels import forced
from bench.records import RESULTS, environment, record, write_text
from csrc_triton.tiles import ANY_HIDDEN, PERSISTENT_CANDIDATES, TILES, Tile
from npo_kernels.backends.tiles import Row, find_tile, hidden_bucket

HELP = "sweep the tiles of the projection kernel on a GPU"

# Powers of two around what the table has; those that need more registers or shared memory than there are fail.
BLOCKS_N, BLOCKS_V, BLOCKS_H = (64, 128), (64, 128, 256), (32, 64, 128)
WARPS, STAGES, PIECES = (4, 8), (2, 3, 4), (1, 2, 4)
SPLIT = 1024  # columns of a partial sum: the same for all, so that slices of the vocabulary stay where they are
# Ways through the tiles of a persistent program, where there are descriptors; of fewer shapes, or a sweep takes hours.
LOOPS = {"sm_90": ("serial", "flat"), "sm_100": ("serial", "flat", "specialized"), "sm_120": ("serial", "flat")}
MARGIN = 0.02  # by which a tile has to beat the entry in force
TABLE = Path(__file__).parents[1] / "csrc_triton" / "tiles.py"


class Sweep(TypedDict):
    """What was found at one hidden size; tiles are as `repr` writes them."""

    H: int
    present: str  # the entry in force
    suggestion: str | None  # a line of the table
    medians: dict[str, float]  # milliseconds, of the best in turns
    once: dict[str, float]
    failed: dict[str, str]  # why


def candidates(architecture: str, bits: int) -> list[Tile]:
    """Tiles whose accumulator takes 64 to 256 registers a thread; 128-byte rows of large tiles also persistent."""
    found = []
    for n, v, h, warps, stages, pieces in itertools.product(BLOCKS_N, BLOCKS_V, BLOCKS_H, WARPS, STAGES, PIECES):
        if not (64 <= n * v // (32 * warps) <= 256 and v // pieces >= 32):
            continue
        tile = Tile(n, v, h, max(1, SPLIT // v), warps, stages, pieces=pieces)
        found.append(tile)
        if bits == 16 and n == 128 and v >= 128 and h == 64 and stages >= 3:
            found += [tile._replace(loop=loop) for loop in LOOPS.get(architecture, ())]
    known = PERSISTENT_CANDIDATES.get((architecture, bits, ANY_HIDDEN))
    return list(dict.fromkeys([*found, *([known] if known else [])]))


def neighbours(architecture: str, bits: int, H: int) -> list[Tile]:
    """The candidates that differ in one thing from the entry in force or from the persistent one: a first sweep, where
    there is no time for all."""
    present = find_tile(TILES, architecture, bits, H)
    persistent = PERSISTENT_CANDIDATES.get((architecture, bits, ANY_HIDDEN))
    centres = [present, persistent] if persistent else [present]
    fields = ("block_n", "block_v", "block_h", "num_warps", "num_stages", "pieces", "loop")

    def near(tile: Tile, centre: Tile) -> bool:
        return sum(getattr(tile, f) != getattr(centre, f) for f in fields) <= 1

    found = [tile for tile in candidates(architecture, bits) if any(near(tile, centre) for centre in centres)]
    return list(dict.fromkeys([*centres, *found]))


def projection(tile: Tile, hidden: Tensor, weight: Tensor, target: Tensor, store: bool) -> Callable[[], object]:
    """One launch of the kernel with a tile, whatever the table says."""
    from npo_kernels.backends import triton as triton_backend
    from npo_kernels.core.lm_head import Head as KernelHead

    head = KernelHead(weight, None, 1.0, None)
    anchor = torch.zeros(hidden.shape[0], device=hidden.device)

    def run():
        with forced(lambda *_: tile):
            if store:
                return triton_backend.exp_logits(hidden, head, target, anchor, (0, weight.shape[0]))
            return triton_backend.partial_sums(hidden, head, target, anchor)

    return run


def sweep(
    tiles: Sequence[Tile],  # the first of them, the entry in force, is one of the finalists
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    reps: int,
    keep: int = 8,
) -> tuple[dict[Tile, float | Failure], dict[Tile, float]]:
    """Milliseconds of storing plus not storing: of each tile once, and medians of the `keep` best in turns."""
    clock = Clock(str(hidden.device))
    results: dict[Tile, float | Failure] = {}

    def measure(tile: Tile) -> float:
        total = 0.0
        for store in (True, False):
            run = projection(tile, hidden, weight, target, store)
            run()
            clock.wait()
            start = clock.mark()
            run()
            end = clock.mark()
            clock.wait()
            total += clock.milliseconds(start, end)
        return total

    for tile in tiles:
        try:
            results[tile] = measure(tile)
        except Exception as error:  # out of registers or shared memory, or the compiler's own
            results[tile] = failure(error)
    timed = {tile: ms for tile, ms in results.items() if not isinstance(ms, Failure)}
    order = sorted(timed, key=timed.__getitem__)
    finalists: dict[Tile, list[float]] = {tile: [] for tile in order if tile == tiles[0] or tile in order[:keep]}
    for _ in range(reps):
        for tile, times in finalists.items():
            times.append(measure(tile))
    return results, {tile: statistics.median(times) for tile, times in finalists.items()}


def winner(medians: dict[Tile, float], present: Tile) -> Tile:
    """The fastest tile, or the one in force where that is not beaten by more than the margin."""
    best = min(medians, key=medians.__getitem__)
    return best if medians[best] < (1 - MARGIN) * medians.get(present, math.inf) else present


def entry(architecture: str, bits: int, hidden_size: int, tile: Tile) -> str:
    """A line of the table, of the bucket of the hidden size."""
    fields, usual = tile._asdict(), Tile._field_defaults
    values = [repr(value) for name, value in fields.items() if name not in usual]
    options = [(name, value) for name, value in fields.items() if name in usual and value != usual[name]]
    values += [f"{name}={value!r}".replace("'", '"') for name, value in options]
    return f'("{architecture}", {bits}, {hidden_bucket(hidden_size)}): Tile({", ".join(values)}),'


def with_entry(source: str, line: str, table: str = "TILES") -> str:
    """The text of tiles.py with a line in a table: in place of that with its key, or behind others of its kind."""
    key = line.partition(":")[0]
    kind = key.rpartition(",")[0]
    begin = source.index(f"\n{table} = {{") + 1
    lines = source[begin : source.index("}\n", begin)].splitlines()
    same = [i for i, other in enumerate(lines) if other.strip().startswith(key + ":")]
    last = max((i for i, other in enumerate(lines) if other.strip().startswith(kind + ",")), default=len(lines) - 1)
    lines[same[0] if same else last + 1 : same[0] + 1 if same else last + 1] = ["    " + line]
    return source[:begin] + "\n".join(lines) + "\n" + source[source.index("}\n", begin) :]


def with_sweep(source: str, architecture: str, bits: int, found: Sweep, out: Path) -> str:
    """The text of tiles.py with the winner, if there is one, and the result file that the choice rests on."""
    if found["suggestion"]:
        source = with_entry(source, found["suggestion"])
    root = TABLE.parents[1]
    name = out.resolve().relative_to(root) if out.resolve().is_relative_to(root) else out
    return with_entry(source, f'("{architecture}", {bits}, {hidden_bucket(found["H"])}): "{name}",', "MEASURED")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--H", type=int, nargs="+", default=[576, 2048, 4096, 8192], help="hidden sizes, one a bucket")
    parser.add_argument("--N", type=int, default=8192)
    parser.add_argument("--V", type=int, default=128256)
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="enter the winners in csrc_triton/tiles.py")
    parser.add_argument("--out", type=Path, help="default: bench/results/tune_ARCHITECTURE_DTYPE.json")


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("bench tune: there is no GPU here, and tiles are chosen by measuring on one", file=sys.stderr)
        return 1
    if len({hidden_bucket(H) for H in args.H}) < len(args.H):
        print("bench tune: two of --H share a bucket, and so an entry of the table", file=sys.stderr)
        return 2
    row, dtype = row_of("cuda"), getattr(torch, args.dtype)
    if row.note and args.write:
        how = f"copy the lines of {row.architecture!r} in csrc_triton/tiles.py, renamed {row.own!r}, first"
        print(f"bench tune: {row.note}: {how}", file=sys.stderr)
        return 2
    architecture, measured = row.architecture, []
    for H in args.H:
        tensors = operands(H, args.N, args.V, dtype, "cuda")
        tiles = candidates(architecture, 8 * dtype.itemsize)
        measured.append(sweep_hidden(architecture, H, tiles, tensors, args.reps, row.own))
        _print(H, measured[-1]["medians"])
    out = args.out or RESULTS / f"tune_{row.own}_{args.dtype}.json"
    write_document(out, "cuda", args.N, args.V, args.dtype, measured)
    for found in measured:
        print(found["suggestion"] or f"H={found['H']}: nothing beats {found['present']}")
        if args.write:
            source = with_sweep(TABLE.read_text(), architecture, 8 * dtype.itemsize, found, out)
            write_text(TABLE, source)
    return 0


def row_of(device: str) -> Row:
    """The row of the tile table that a device takes, and the one that a measurement on it belongs in."""
    from npo_kernels.backends.tiles import tile_row

    return tile_row(torch.device(device))


def operands(H: int, N: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states (N, H), head (V, H) and labels (N,)."""
    case = Case(f"H={H}", Head(H, V), head_case("llama-3-8b", N).lengths)
    return case.batch(dtype, device, "logprobs").flat


def sweep_hidden(
    architecture: str,  # whose row the entry in force is from
    H: int,
    tiles: Sequence[Tile],
    tensors: tuple[Tensor, Tensor, Tensor],
    reps: int,
    own: str,  # the row that a winner belongs in
) -> Sweep:
    """All tiles at one hidden size: what they took, and the line of the table if one beats the entry in force."""
    bits = 8 * tensors[0].itemsize
    present = find_tile(TILES, architecture, bits, H)
    results, medians = sweep(list(dict.fromkeys([present, *tiles])), *tensors, reps)
    best = winner(medians, present)
    return {
        "H": H,
        "present": repr(present),
        "suggestion": None if best == present else entry(own, bits, H, best),
        "medians": {repr(t): ms for t, ms in sorted(medians.items(), key=lambda item: item[1])},
        "once": {repr(t): ms for t, ms in results.items() if not isinstance(ms, Failure)},
        "failed": {repr(t): ms.error for t, ms in results.items() if isinstance(ms, Failure)},
    }


def write_document(out: Path, device: str, N: int, V: int, dtype: str, sweeps: Sequence[Sweep]) -> None:
    """Everything that the choice rests on."""
    known = {**environment(device), "date": record(device)["date"], "N": N, "V": V, "dtype": dtype}
    write_text(out, json.dumps({**known, "sweeps": list(sweeps)}, indent=1) + "\n")


def _print(H: int, medians: dict[str, float]) -> None:
    table = Table(title=f"H={H}: projection, storing and not")
    table.add_column("tile")
    table.add_column("ms", justify="right")
    for tile, milliseconds in medians.items():
        table.add_row(tile, f"{milliseconds:.3f}")
    Console().print(table)
