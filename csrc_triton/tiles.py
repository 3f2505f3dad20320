"""Tile shapes of `exp_logits` and `kl_logits` per architecture, operand width and hidden size: pure data.

Every entry is compiled ahead of time in tests/aot for its architecture; registers, spills and shared memory are on
record there. An entry never depends on N, so that the log-probability of a row does not either. Nothing is tuned at
import or at a first call: `python -m bench tune --write` measures on a GPU and edits this file. Which entry a call
takes is `npo_kernels.backends.tiles`'s.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """block_n rows x (split_tiles x block_v) columns of logits a program, block_h deep a step,
    finished in `pieces` parts of block_v / pieces columns.

    `loop` is how a program of `exp_logits_persistent_kernel` goes from tile to tile: "serial"; "flat", where a tile's
    loads begin before the last one is finished; or "specialized", where other warps do them (sm_100). "":
    `exp_logits_kernel`, which does one split and ends.
    """

    block_n: int
    block_v: int
    block_h: int
    split_tiles: int
    num_warps: int
    num_stages: int
    group: int = 8
    pieces: int = 1
    loop: str = ""

    @property
    def split(self) -> int:
        """Columns whose exponentials share one partial sum; slices that sums are taken of begin at multiples of it."""
        return self.block_v * self.split_tiles


# Hidden sizes that share an entry: up to 1024, to 2048, to 4096, and all above. Of a deeper product the epilogue is the
# smaller part, so what is best shifts with H. ANY_HIDDEN holds for every bucket that has no entry of its own.
HIDDEN_BUCKETS = (1024, 2048, 4096, 8192)
ANY_HIDDEN = 0

# (architecture, bits of an operand, hidden bucket) -> tile
TILES = {
    ("sm_80", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 4, pieces=2),
    ("sm_86", 16, ANY_HIDDEN): Tile(128, 128, 32, 8, 4, 4, pieces=4),
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 256, 64, 4, 8, 4, pieces=4),
    ("sm_90", 16, 2048): Tile(128, 256, 64, 4, 8, 3, pieces=4),
    ("sm_90", 16, 4096): Tile(128, 256, 64, 4, 8, 3, pieces=4, loop="flat"),
    ("sm_100", 16, ANY_HIDDEN): Tile(128, 256, 64, 4, 8, 4, pieces=4),
    ("sm_120", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 3, pieces=2),
    ("gfx942", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 2, pieces=4),
    ("sm_80", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 3),
    ("sm_86", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("sm_90", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("sm_100", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 3, pieces=4),
    ("sm_120", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("gfx942", 32, ANY_HIDDEN): Tile(64, 128, 32, 8, 8, 2),
    # small, so that small tests have several row blocks, tiles, splits and pieces
    ("interpreter", 16, ANY_HIDDEN): Tile(16, 64, 32, 2, 4, 1, 2, 2),
    ("interpreter", 32, ANY_HIDDEN): Tile(16, 64, 32, 2, 4, 1, 2, 2),
}

# What a choice for a hidden bucket rests on: the result file of a sweep with the tile among its finalists. Choices that
# are not here were counted (tests/aot), not measured.
MEASURED = {
    ("sm_90", 16, 1024): "bench/results/h100_1/tune.json",
    ("sm_90", 16, 2048): "bench/results/h100_1/tune.json",
    ("sm_90", 16, 4096): "bench/results/h100_1/tune.json",
}

# Of `kl_logits`, which holds two accumulators side by side: narrower.
PAIR_TILES = {
    ("sm_80", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 4),
    ("sm_86", 16, ANY_HIDDEN): Tile(64, 64, 32, 16, 4, 4),
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 4),
    ("sm_100", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 4),
    ("sm_120", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 3),
    ("gfx942", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 2),
    ("sm_80", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 4),
    ("sm_86", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 4),
    ("sm_90", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 4),
    ("sm_100", 32, ANY_HIDDEN): Tile(64, 64, 16, 16, 8, 4),  # 32 deep some of these spill
    ("sm_120", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 4),
    ("gfx942", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 2),
    ("interpreter", 16, ANY_HIDDEN): Tile(16, 32, 32, 4, 4, 1, 2),
    ("interpreter", 32, ANY_HIDDEN): Tile(16, 32, 32, 4, 4, 1, 2),
}

# Tiles of `exp_logits_persistent_kernel` for every hidden size: compiled ahead of time like entries of the table and
# swept beside all others by `python -m bench tune`. A call takes one once it was measured and entered in TILES, as that
# of sm_90 at 4096 was, with a stage less. None of 32 bits: the operands of an IEEE float32 product come from shared
# memory through registers, where a descriptor's layout makes the best of tiles spill.
PERSISTENT_CANDIDATES = {
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 256, 64, 4, 8, 4, pieces=4, loop="flat"),
    ("sm_100", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 4, pieces=2, loop="specialized"),
    ("sm_120", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 3, pieces=2, loop="flat"),
}

# The same of `softmax_sums_persistent_kernel` and `kl_logits_persistent_kernel`.
PERSISTENT_PAIR_CANDIDATES = {
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 4, loop="flat"),
}

# What MEASURED is to TILES: of PAIR_TILES, where the persistent kernels are taken only if they are in here.
PAIR_MEASURED: dict[tuple[str, int, int], str] = {}

# Row moments take the entries of TILES, but for the warps: six sums a row beside the tile do not fit four.
MOMENT_WARPS = 8
# By bits of an operand: how much narrower pieces of `moment_gradient_kernel` are, which reads six vectors beside each.
GRADIENT_PIECES = {16: 1, 32: 2}
# How `row_moments_persistent_kernel` goes from tile to tile: "serial" or "flat", as in `Tile.loop`. Without an entry
# `row_moments_kernel` runs, and there is an entry only where it was measured.
MOMENT_LOOPS: dict[tuple[str, int, int], str] = {}
# What MEASURED is to TILES, of the tile of that table.
MOMENT_MEASURED: dict[tuple[str, int, int], str] = {}

BLOCK_POSITIONS = 1024  # of the batch, scored or not, a program of the compaction
POSITION_WARPS = 8  # of those kernels: with four one of them spills under Triton 3.6
BLOCK_ROWS = 128  # rows a program of the (N,) kernels
BLOCK_HIDDEN = 1024  # elements of H a program of the (N, H) kernels
BLOCK_SCALED = 4096  # elements of a gradient a program multiplies
BLOCK_RUN = 8  # rows of one label summed at a time
ROW_WARPS = 4
