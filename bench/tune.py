"""Sweep the tiles of the projection kernel on the GPU at hand and suggest entries for csrc_triton/tiles.py.

For (architecture, dtype, H): every candidate is compiled and timed, storing the exponentials and not, at the N of a
large batch and the vocabulary given, the best ones in turns; what does not fit fails and is listed. Nothing is tuned at
import or at the first call of the library: the table is data, and what this writes is a suggestion to be read, compiled
ahead of time (tests/aot) and committed. Tiles never depend on N, and a new one changes the bits of the
log-probabilities.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.cases import Case, Head, head_case
from bench.measure import Clock, Failure, failure
from bench.records import RESULTS, environment, record, write_text

HELP = "sweep the tiles of the projection kernel on a GPU"

# Powers of two around what the table has; those that need more registers or shared memory than there are fail.
BLOCKS_N, BLOCKS_V, BLOCKS_H = (64, 128), (64, 128, 256), (32, 64, 128)
WARPS, STAGES, PIECES = (4, 8), (2, 3, 4), (1, 2, 4)
SPLIT = 1024  # columns of a partial sum: the same for all, so that slices of the vocabulary stay where they are


def candidates() -> Iterator:
    """Tiles whose accumulator takes 64 to 256 registers a thread."""
    from csrc_triton.tiles import Tile

    for n, v, h, warps, stages, pieces in itertools.product(BLOCKS_N, BLOCKS_V, BLOCKS_H, WARPS, STAGES, PIECES):
        if 64 <= n * v // (32 * warps) <= 256 and v // pieces >= 32:
            yield Tile(n, v, h, max(1, SPLIT // v), warps, stages, pieces=pieces)


def projection(tile, hidden: Tensor, weight: Tensor, target: Tensor, store: bool) -> Callable[[], object]:
    """One launch of the kernel with a tile, whatever the table says."""
    from npo_kernels import triton_backend
    from npo_kernels.head import Head as KernelHead

    head = KernelHead(weight, None, 1.0, None)
    anchor = torch.zeros(hidden.shape[0], device=hidden.device)

    def run():
        with mock.patch.object(triton_backend, "tile_for", lambda *_: tile):
            return triton_backend.exp_logits(hidden, head, target, anchor, (0, weight.shape[0]), store=store)

    return run


def sweep(
    tiles: Sequence, hidden: Tensor, weight: Tensor, target: Tensor, reps: int, keep: int = 8
) -> dict[object, float | Failure]:
    """tile -> median milliseconds of storing plus not storing: once each, then the `keep` best in turns."""
    clock = Clock(str(hidden.device))
    results: dict[object, float | Failure] = {}

    def measure(tile) -> float:
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
    timed = sorted((tile for tile, ms in results.items() if not isinstance(ms, Failure)), key=results.get)
    finalists: dict[object, list[float]] = {tile: [] for tile in timed[:keep]}
    for _ in range(reps):
        for tile, times in finalists.items():
            times.append(measure(tile))
    return results | {tile: statistics.median(times) for tile, times in finalists.items()}


def suggestion(architecture: str, bits: int, H: int, best) -> str:
    """A line for the table."""
    return f'("{architecture}", {bits}, {H}): {best!r},'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--H", type=int, nargs="+", default=[576, 2048, 4096], help="hidden sizes, one bucket each")
    parser.add_argument("--N", type=int, default=8192)
    parser.add_argument("--V", type=int, default=128256)
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: bench/results/tune_ARCHITECTURE_DTYPE.json")


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("bench tune: there is no GPU here, and tiles are chosen by measuring on one", file=sys.stderr)
        return 1
    from npo_kernels.triton_backend import _architecture

    architecture, dtype = _architecture(torch.device("cuda")), getattr(torch, args.dtype)
    measured = []
    for H in args.H:
        case: Case = head_case("llama-3-8b", args.N)
        case = Case(f"H={H}", Head(H, args.V), case.lengths)
        hidden, weight, labels = case.batch(dtype, "cuda", "logprobs").flat
        results = sweep(list(candidates()), hidden, weight, labels, args.reps)
        best = min((tile for tile, ms in results.items() if not isinstance(ms, Failure)), key=results.get)
        measured.append(
            {
                "H": H,
                "suggestion": suggestion(architecture, 8 * dtype.itemsize, H, best),
                "milliseconds": {repr(t): ms for t, ms in results.items() if not isinstance(ms, Failure)},
                "failed": {repr(t): ms.error for t, ms in results.items() if isinstance(ms, Failure)},
            }
        )
        _print(H, results)
    date = record("cuda")["date"]
    document = {**environment("cuda"), "date": date, "N": args.N, "V": args.V, "dtype": args.dtype, "sweeps": measured}
    out = args.out or RESULTS / f"tune_{architecture}_{args.dtype}.json"
    write_text(out, json.dumps(document, indent=1) + "\n")
    for entry in measured:
        print(entry["suggestion"])
    return 0


def _print(H: int, results: dict) -> None:
    table = Table(title=f"H={H}: projection, storing and not")
    table.add_column("tile")
    table.add_column("ms", justify="right")
    timed = {tile: ms for tile, ms in results.items() if not isinstance(ms, Failure)}
    for tile in sorted(timed, key=timed.get)[:10]:
        table.add_row(repr(tile), f"{timed[tile]:.3f}")
    Console().print(table)
