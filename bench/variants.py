"""The persistent kernels of KL and of row moments beside the current ones, at the hidden sizes of `bench.tune`.

The tile of KL is that of `softmax_sums`, `kl_sums` and `kl_logits`, so all three are timed: the whole vocabulary, and
one slice for `kl_logits`. Row moments use the tile of the projection; only the loop is chosen, and results show that
tile with the chosen loop.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from bench.cases import Batch
from bench.providers.kernels import forced_moments, forced_pair
from bench.sweeps import Sweep, entry, key_of, outcome, take_turns
from csrc_triton.tiles import (
    ANY_HIDDEN,
    MOMENT_LOOPS,
    PAIR_TILES,
    PERSISTENT_CANDIDATES,
    PERSISTENT_PAIR_CANDIDATES,
    Tile,
)
from npo_kernels.backends.tiles import Row, find_entry, find_tile

SLICE = 16384  # columns whose gradient is stored
LOOPS = "serial", "flat"

Runs = dict[Tile, list[Callable[[], object]]]


def pair_tiles(architecture: str, bits: int, H: int) -> list[Tile]:
    """The current entry and its simple counterpart; the persistent candidate, also with the other loop or a stage
    less."""
    present = find_tile(PAIR_TILES, architecture, bits, H)
    found = [present, present._replace(loop="")]
    candidate = PERSISTENT_PAIR_CANDIDATES.get((architecture, bits, ANY_HIDDEN))
    if candidate and _describable(H, bits):
        found += [candidate._replace(loop=loop) for loop in LOOPS]
        found.append(candidate._replace(num_stages=candidate.num_stages - 1))
    return list(dict.fromkeys(found))


def moment_tiles(architecture: str, bits: int, H: int, tile: Tile) -> list[Tile]:
    """A tile of the projection with the current loop and, on GPUs with descriptors, with every other loop."""
    present = find_entry(MOMENT_LOOPS, architecture, bits, H) or ""
    known = (architecture, bits, ANY_HIDDEN) in PERSISTENT_CANDIDATES
    persistent = LOOPS if known and _describable(H, bits) else ()
    return [tile._replace(loop=loop) for loop in dict.fromkeys([present, "", *persistent])]


def _describable(H: int, bits: int) -> bool:
    """Whether rows begin at multiples of 16 bytes; otherwise a persistent tile runs the simple kernel."""
    return H * bits % 128 == 0


def pair_runs(tiles: Iterable[Tile], batch: Batch) -> Runs:
    """The timed runs of each tile; the reference has a head of its own, as in a call."""
    from npo_kernels.backends import triton as backend
    from npo_kernels.core.lm_head import Head
    from npo_kernels.core.softmax_stats import Divergence, Normalizers, merge_sums

    hidden, weight, _ = batch.flat
    ref_hidden = batch.ref_hidden.flatten(0, 1)
    head, ref_head = Head(weight), Head(weight.clone())
    sides = hidden, head, ref_hidden, ref_head
    model = merge_sums(*backend.softmax_sums(hidden, head, ref_hidden, None))
    reference = merge_sums(*backend.softmax_sums(ref_hidden, ref_head, hidden, None))
    divergence = Divergence(Normalizers(*model, *reference).vectors())
    columns = 0, min(SLICE, weight.shape[0])
    calls = [
        lambda: backend.softmax_sums(hidden, head, ref_hidden, None),
        lambda: backend.kl_sums(*sides, divergence),
        lambda: backend.kl_logits(*sides, divergence, columns),
    ]
    return {tile: [_under(forced_pair, tile, call) for call in calls] for tile in tiles}


def moment_runs(tiles: Iterable[Tile], batch: Batch) -> Runs:
    """One launch each."""
    from npo_kernels.backends import triton as backend
    from npo_kernels.core.lm_head import Head

    hidden, weight, target = batch.flat
    return {t: [_under(forced_moments, t, lambda: backend.row_moments(hidden, Head(weight), target))] for t in tiles}


def _under(
    forcing: Callable[[Tile], AbstractContextManager], tile: Tile, call: Callable[[], object]
) -> Callable[[], object]:
    def run():
        with forcing(tile):
            return call()

    return run


def sweep_pairs(row: Row, tiles: list[Tile], batch: Batch, reps: int, seconds: float = math.inf) -> Sweep:
    """KL; the first of the tiles is the current entry."""
    H, bits = batch.weight.shape[1], 8 * batch.weight.itemsize
    times = take_turns(pair_runs(tiles, batch), str(batch.weight.device), reps, seconds=seconds)
    return outcome(H, tiles[0], times, lambda tile: entry(row.own, bits, H, tile))


def sweep_moments(row: Row, tiles: list[Tile], batch: Batch, reps: int, seconds: float = math.inf) -> Sweep:
    """Row moments; the loop of the first of the tiles is the current one."""
    H, bits = batch.weight.shape[1], 8 * batch.weight.itemsize
    times = take_turns(moment_runs(tiles, batch), str(batch.weight.device), reps, seconds=seconds)
    return outcome(H, tiles[0], times, lambda tile: f'{key_of(row.own, bits, H)}: "{tile.loop}",')
