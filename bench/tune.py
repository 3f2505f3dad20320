"""Sweep the tiles of the projection kernels on the current GPU, and enter the winners in csrc_triton/tiles.py.

For (architecture, dtype, H): every candidate is compiled and timed, storing the exponentials and not, at the N of a
large batch and the given vocabulary; then the best ones take turns with the current entry. On GPUs with tensor
descriptors (sm_90 and later) persistent tiles are candidates too. Tiles that do not fit fail and are listed.
Then the persistent kernels of KL and of row moments are compared with the current ones (`bench.variants`).

A hidden size represents its bucket (`npo_kernels.backends.tiles`). A tile that beats the current entry by more than a
margin is printed, and with --write it is entered in the table, together with the name of the result file. Review it,
compile it ahead of time (tests/aot) and commit it: a new tile changes the bits of the log-probabilities. Nothing is
tuned at import or at a first call. Tiles never depend on N.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import variants
from bench.cases import Batch, Case, Head, head_case
from bench.providers.kernels import forced
from bench.records import RESULTS, environment, record, write_text
from bench.sweeps import Sweep, Times, entry, key_of, outcome, take_turns
from csrc_triton.tiles import ANY_HIDDEN, PERSISTENT_CANDIDATES, TILES, Tile
from npo_kernels.backends.tiles import Row, find_tile, hidden_bucket

HELP = "sweep the tiles of the projection kernel on a GPU"

# Powers of two around the table's values; those that need too many registers or too much shared memory fail.
BLOCKS_N, BLOCKS_V, BLOCKS_H = (64, 128), (64, 128, 256), (32, 64, 128)
WARPS, STAGES, PIECES = (4, 8), (2, 3, 4), (1, 2, 4)
SPLIT = 1024  # columns of a partial sum: the same for all, so that slices of the vocabulary stay where they are
# Loops of the persistent kernel, on GPUs with descriptors; with fewer shapes, as the sweep would take hours otherwise.
LOOPS = {"sm_90": ("serial", "flat"), "sm_100": ("serial", "flat", "specialized"), "sm_120": ("serial", "flat")}
TABLE = Path(__file__).parents[1] / "csrc_triton" / "tiles.py"
# Section of a result file -> the tables it belongs to: the choices, and the files where they were measured.
TABLES = {
    "sweeps": ("TILES", "MEASURED"),
    "pairs": ("PAIR_TILES", "PAIR_MEASURED"),
    "moments": ("MOMENT_LOOPS", "MOMENT_MEASURED"),
}


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
    """The candidates that differ in one field from the current entry or from the persistent one: a first sweep, for
    when there is no time for all."""
    present = find_tile(TILES, architecture, bits, H)
    persistent = PERSISTENT_CANDIDATES.get((architecture, bits, ANY_HIDDEN))
    centres = [present, persistent] if persistent else [present]
    fields = ("block_n", "block_v", "block_h", "num_warps", "num_stages", "pieces", "loop")

    def near(tile: Tile, centre: Tile) -> bool:
        return sum(getattr(tile, f) != getattr(centre, f) for f in fields) <= 1

    found = [tile for tile in candidates(architecture, bits) if any(near(tile, centre) for centre in centres)]
    return list(dict.fromkeys([*centres, *found]))


def projection(tile: Tile, hidden: Tensor, weight: Tensor, target: Tensor, store: bool) -> Callable[[], object]:
    """One launch of the kernel with the given tile instead of the table's."""
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
    tiles: Sequence[Tile],  # the first is the current entry
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    reps: int,
) -> Times:
    """Times of storing plus not storing."""
    runs = {t: [projection(t, hidden, weight, target, store) for store in (True, False)] for t in tiles}
    return take_turns(runs, str(hidden.device), reps)


def with_entry(source: str, line: str, table: str = "TILES") -> str:
    """The text of tiles.py with a line added to a table: in place of the line with its key, or after similar ones."""
    key = line.partition(":")[0]
    kind = key.rpartition(",")[0]
    source = re.sub(rf"^({table}\b.* = {{)}}$", r"\1\n}", source, flags=re.MULTILINE)  # an empty one
    begin = next(re.finditer(rf"^{table}\b.* = {{$", source, re.MULTILINE)).start()
    lines = source[begin : source.index("}\n", begin)].splitlines()
    same = [i for i, other in enumerate(lines) if other.strip().startswith(key + ":")]
    last = max((i for i, other in enumerate(lines) if other.strip().startswith(kind + ",")), default=len(lines) - 1)
    lines[same[0] if same else last + 1 : same[0] + 1 if same else last + 1] = ["    " + line]
    return source[:begin] + "\n".join(lines) + "\n" + source[source.index("}\n", begin) :]


def with_sweep(source: str, architecture: str, bits: int, found: Sweep, out: Path, kind: str = "sweeps") -> str:
    """The text of tiles.py with the winner, if there is one, and the result file of the choice."""
    table, measured = TABLES[kind]
    if found["suggestion"]:
        source = with_entry(source, found["suggestion"], table)
    root = TABLE.parents[1]
    name = out.resolve().relative_to(root) if out.resolve().is_relative_to(root) else out
    return with_entry(source, f'{key_of(architecture, bits, found["H"])}: "{name}",', measured)


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
    bits, measured = 8 * dtype.itemsize, empty()
    for H in args.H:
        for kind, found in sweep_all(row, H, batch_of(H, args.N, args.V, dtype, "cuda"), args.reps):
            measured[kind].append(found)
            _print(kind, found)
    out = args.out or RESULTS / f"tune_{row.own}_{args.dtype}.json"
    write_document(out, "cuda", args.N, args.V, args.dtype, measured)
    for kind, sweeps in measured.items():
        for found in sweeps:
            print(found["suggestion"] or f"{kind}, H={found['H']}: nothing beats {found['present']}")
            if args.write and found["medians"]:
                source = with_sweep(TABLE.read_text(), row.architecture, bits, found, out, kind)
                write_text(TABLE, source)
    return 0


def empty() -> dict[str, list[Sweep]]:
    """The content of a result file without measurements."""
    return {kind: [] for kind in TABLES}


def sweep_all(row: Row, H: int, batch: Batch, reps: int) -> Iterator[tuple[str, Sweep]]:
    """All sweeps of one hidden size that have a choice; row moments use the tile that the projection will have."""
    bits = 8 * batch.weight.itemsize
    tiles = candidates(row.architecture, bits)
    found = sweep_hidden(row.architecture, H, tiles, batch.flat, reps, row.own)
    yield "sweeps", found
    pairs = variants.pair_tiles(row.architecture, bits, H)
    if len(pairs) > 1:
        yield "pairs", variants.sweep_pairs(row, pairs, batch, reps)
    present = find_tile(TILES, row.architecture, bits, H)
    chosen = next((tile for tile in tiles if entry(row.own, bits, H, tile) == found["suggestion"]), present)
    moments = variants.moment_tiles(row.architecture, bits, H, chosen)
    if len(moments) > 1:
        yield "moments", variants.sweep_moments(row, moments, batch, reps)


def row_of(device: str) -> Row:
    """The row of the tile table that a device uses, and the row that its measurements belong to."""
    from npo_kernels.backends.tiles import tile_row

    return tile_row(torch.device(device))


def batch_of(H: int, N: int, V: int, dtype: torch.dtype, device: str) -> Batch:
    """Random hidden states of a model and a reference, and a head (V, H)."""
    return Case(f"H={H}", Head(H, V), head_case("llama-3-8b", N).lengths).batch(dtype, device, "logprobs")


def sweep_hidden(
    architecture: str,  # the row of the current entry
    H: int,
    tiles: Sequence[Tile],
    tensors: tuple[Tensor, Tensor, Tensor],
    reps: int,
    own: str,  # the row for a winner
) -> Sweep:
    """All tiles at one hidden size: their times, and the line of the table if one beats the current entry."""
    bits = 8 * tensors[0].itemsize
    present = find_tile(TILES, architecture, bits, H)
    times = sweep(list(dict.fromkeys([present, *tiles])), *tensors, reps)
    return outcome(H, present, times, lambda tile: entry(own, bits, H, tile))


def write_document(out: Path, device: str, N: int, V: int, dtype: str, measured: Mapping[str, Sequence[Sweep]]) -> None:
    """Writes all measurements behind the choices."""
    known = {**environment(device), "date": record(device)["date"], "N": N, "V": V, "dtype": dtype}
    write_text(out, json.dumps({**known, **measured}, indent=1) + "\n")


def _print(kind: str, found: Sweep) -> None:
    what = {"sweeps": "projection, storing and not", "pairs": "KL", "moments": "row moments"}[kind]
    table = Table(title=f"H={found['H']}: {what}")
    table.add_column("tile")
    table.add_column("ms", justify="right")
    for tile, milliseconds in found["medians"].items():
        table.add_row(tile, f"{milliseconds:.3f}")
    Console().print(table)
