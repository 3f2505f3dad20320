"""The neighbours of the current tiles, and the persistent kernels of KL and of row moments, at the hidden sizes of the
other stages; a winner is written as a line of the table."""

import json
import time
from functools import partial

import torch

from bench import tune, variants
from bench.cases import Batch
from bench.certify.specializations import Compilers, collect
from bench.certify.unit import Context, Unit
from bench.providers import UnsupportedError
from bench.sweeps import Sweep
from csrc_triton.tiles import PAIR_TILES, TILES, Tile
from npo_kernels.backends.tiles import find_tile

# Llama-3-8B and Llama-2-7B, Llama-3.2-1B, SmolLM2-135M -> seconds of the sweep (bench/results/h100_1)
HIDDEN = {4096: 7, 2048: 4, 576: 2}
N, V = 8192, 128256
ROWS = 64  # of a call that is only compiled
REPS = 10
SECONDS = {"pairs": 2.0, "moments": 1.0}  # after which no more turns begin
TOY_H = 48
TOY = [Tile(16, 32, 32, 2, 4, 1), Tile(16, 64, 32, 1, 4, 1)]
DTYPE = torch.bfloat16


def units(context: Context) -> list[Unit]:
    hidden = {TOY_H: 1} if context.toy else HIDDEN
    found = [Unit(f"H={H}", partial(sweep, H), seconds) for H, seconds in hidden.items()]
    for what, kind in (("KL", "pairs"), ("row moments", "moments")):
        # at least one turn of all, and their operands
        found += [Unit(f"{what}, H={H}", partial(compare, kind, H), SECONDS[kind] + 2, limit=20) for H in hidden]
    return found if context.toy else [Unit("compile the candidates", compile_candidates, 15), *found]


def compile_candidates(context: Context) -> str:
    """For all hidden sizes; candidates that do not compile fail again in the sweep, which has the reason."""
    compilers, start = Compilers(), time.monotonic()  # forked before the first call initialises the GPU
    architecture = tune.row_of(context.device).architecture

    def calls():
        batches = {H: tune.batch_of(H, ROWS, V, DTYPE, context.device) for H in HIDDEN}
        for H, batch in batches.items():
            for tile in tune.neighbours(architecture, 16, H):
                yield from (tune.projection(tile, *batch.flat, store) for store in (True, False))
        for H, batch in batches.items():
            for kind, runs in (("pairs", variants.pair_runs), ("moments", variants.moment_runs)):
                for several in runs(tiles_of(kind, H, architecture), batch).values():
                    yield from several

    compiled = compilers.compile(collect(calls()))
    compilers.close()
    failed = sum(c.error is not None for c in compiled)
    text = f"{len(compiled)} specialisations in {time.monotonic() - start:.1f} s by {compilers.jobs} processes"
    return f"{text}, {failed} do not compile" if failed else text


def tiles_of(kind: str, H: int, architecture: str) -> list[Tile]:
    """The compared tiles, for 16-bit operands."""
    if architecture == "interpreter":  # has no candidates
        present = find_tile(PAIR_TILES if kind == "pairs" else TILES, architecture, 32, H)
        return [present, present._replace(loop="flat")]
    if kind == "pairs":
        return variants.pair_tiles(architecture, 16, H)
    return variants.moment_tiles(architecture, 16, H, find_tile(TILES, architecture, 16, H))


def sweep(H: int, context: Context) -> str:
    """One run of each tile, then the best in turns."""
    row, batch, reps = tune.row_of(context.device), operands(H, context), 1 if context.toy else REPS
    tiles = TOY if context.toy else tune.neighbours(row.architecture, 16, H)
    return keep("sweeps", tune.sweep_hidden(row.architecture, H, tiles, batch.flat, reps, row.own), context)


def compare(kind: str, H: int, context: Context) -> str:
    """The persistent kernels beside the current one, in turns for a second or two."""
    row = tune.row_of(context.device)
    tiles = tiles_of(kind, H, row.architecture)
    if len(tiles) == 1:
        raise UnsupportedError(f"no persistent kernel to compare with on {row.architecture}")
    measure = variants.sweep_pairs if kind == "pairs" else variants.sweep_moments
    return keep(kind, measure(row, tiles, operands(H, context), 1 if context.toy else REPS, SECONDS[kind]), context)


def operands(H: int, context: Context) -> Batch:
    rows, columns = shape(context)
    return tune.batch_of(H, rows, columns, torch.float32 if context.toy else DTYPE, context.device)


def shape(context: Context) -> tuple[int, int]:
    return (16, 256) if context.toy else (N, V)


def keep(kind: str, found: Sweep, context: Context) -> str:
    """Adds to the result file; returns the line of the report."""
    path = context.out / "tune.json"
    before = json.loads(path.read_text()) if path.exists() else tune.empty()
    measured = {name: before[name] + [found] * (name == kind) for name in tune.TABLES}
    tune.write_document(path, context.device, *shape(context), "bfloat16", measured)
    if not found["medians"]:
        raise RuntimeError("no tile runs: " + next(iter(found["failed"].values())))
    (best, milliseconds), *_ = found["medians"].items()
    present = found["medians"].get(found["present"])
    against = "the tile in force fails" if present is None else f"{present:.2f} ms in force"
    return f"{found['suggestion'] or 'nothing beats ' + found['present']}; {milliseconds:.2f} ms, {against} ({best})"
