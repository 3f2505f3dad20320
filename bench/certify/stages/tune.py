"""The tiles next to those in force, at the hidden sizes of the other stages; what wins is a line of the table."""

import json
import time
from functools import partial

import torch

from bench import tune
from bench.certify.specializations import Compilers, collect
from bench.certify.unit import Context, Unit
from csrc_triton.tiles import Tile

HIDDEN = (4096, 2048, 576)  # Llama-3-8B and Llama-2-7B, Llama-3.2-1B, SmolLM2-135M
N, V = 8192, 128256
ROWS = 64  # of a call that is only to be compiled
REPS = 10
TOY = (Tile(16, 32, 32, 2, 4, 1), Tile(16, 64, 32, 1, 4, 1))
DTYPE = torch.bfloat16


def units(context: Context) -> list[Unit]:
    found = [Unit(f"H={H}", partial(sweep, H), 7) for H in ((48,) if context.toy else HIDDEN)]
    return found if context.toy else [Unit("compile the candidates", compile_candidates, 12), *found]


def compile_candidates(context: Context) -> str:
    """Of all hidden sizes; those that do not compile fail again in the sweep, which says why."""
    compilers, start = Compilers(), time.monotonic()  # forked before the first call initialises the GPU
    architecture = tune.row_of(context.device).architecture

    def calls():
        for H in HIDDEN:
            tensors = tune.operands(H, ROWS, V, DTYPE, context.device)
            for tile in tune.neighbours(architecture, 16, H):
                yield from (tune.projection(tile, *tensors, store) for store in (True, False))

    compiled = compilers.compile(collect(calls()))
    compilers.close()
    failed = sum(c.error is not None for c in compiled)
    text = f"{len(compiled)} specialisations in {time.monotonic() - start:.1f} s by {compilers.jobs} processes"
    return f"{text}, {failed} do not compile" if failed else text


def sweep(H: int, context: Context) -> str:
    """Once each, then the best in turns."""
    row = tune.row_of(context.device)
    rows, columns = (32, 256) if context.toy else (N, V)
    tensors = tune.operands(H, rows, columns, torch.float32 if context.toy else DTYPE, context.device)
    tiles = TOY if context.toy else tune.neighbours(row.architecture, 16, H)
    found = tune.sweep_hidden(row.architecture, H, tiles, tensors, 1 if context.toy else REPS, row.own)
    path = context.out / "tune.json"
    before = json.loads(path.read_text())["sweeps"] if path.exists() else []
    tune.write_document(path, context.device, rows, columns, "bfloat16", [*before, found])
    (best, milliseconds), *_ = found["medians"].items()
    present = found["medians"].get(found["present"])
    against = "the tile in force fails" if present is None else f"{present:.2f} ms in force"
    return f"{found['suggestion'] or 'nothing beats ' + found['present']}; {milliseconds:.2f} ms, {against} ({best})"
