"""Tile shapes of `exp_logits` and `kl_logits` per architecture and operand width: pure data.

Every entry is compiled ahead of time in tests/aot for its architecture; registers, spills and shared memory are on
record there. An entry never depends on N, so that the log-probability of a row does not either.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """block_n rows x (split_tiles x block_v) columns of logits a program, block_h deep a step,
    finished in `pieces` parts of block_v / pieces columns."""

    block_n: int
    block_v: int
    block_h: int
    split_tiles: int
    num_warps: int
    num_stages: int
    group: int = 8
    pieces: int = 1

    @property
    def split(self) -> int:
        """Columns whose exponentials share one partial sum; vocabulary slices begin at multiples of it."""
        return self.block_v * self.split_tiles


# (architecture, bits of an operand) -> tile
TILES = {
    ("sm_80", 16): Tile(128, 128, 64, 8, 8, 4, pieces=2),
    ("sm_86", 16): Tile(128, 128, 32, 8, 4, 4, pieces=4),
    ("sm_90", 16): Tile(128, 256, 64, 4, 8, 4, pieces=4),
    ("sm_100", 16): Tile(128, 256, 64, 4, 8, 4, pieces=4),
    ("sm_120", 16): Tile(128, 128, 64, 8, 8, 3, pieces=2),
    ("gfx942", 16): Tile(128, 128, 64, 8, 8, 2, pieces=4),
    ("sm_80", 32): Tile(64, 128, 32, 8, 8, 3),
    ("sm_86", 32): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("sm_90", 32): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("sm_100", 32): Tile(64, 128, 32, 8, 8, 3, pieces=4),
    ("sm_120", 32): Tile(64, 128, 32, 8, 8, 3, pieces=2),
    ("gfx942", 32): Tile(64, 128, 32, 8, 8, 2),
    # small, so that small tests have several row blocks, tiles, splits and pieces
    ("interpreter", 16): Tile(16, 64, 32, 2, 4, 1, 2, 2),
    ("interpreter", 32): Tile(16, 64, 32, 2, 4, 1, 2, 2),
}

# Of `kl_logits`, which holds two accumulators side by side: narrower.
PAIR_TILES = {
    ("sm_80", 16): Tile(128, 64, 64, 16, 8, 4),
    ("sm_86", 16): Tile(64, 64, 32, 16, 4, 4),
    ("sm_90", 16): Tile(128, 64, 64, 16, 8, 4),
    ("sm_100", 16): Tile(128, 64, 64, 16, 8, 4),
    ("sm_120", 16): Tile(128, 64, 64, 16, 8, 3),
    ("gfx942", 16): Tile(128, 64, 64, 16, 8, 2),
    ("sm_80", 32): Tile(64, 64, 32, 16, 8, 3),
    ("sm_86", 32): Tile(64, 64, 32, 16, 8, 3),
    ("sm_90", 32): Tile(64, 64, 32, 16, 8, 3),
    ("sm_100", 32): Tile(64, 64, 32, 16, 8, 3),
    ("sm_120", 32): Tile(64, 64, 32, 16, 8, 3),
    ("gfx942", 32): Tile(64, 64, 32, 16, 8, 2),
    ("interpreter", 16): Tile(16, 32, 32, 4, 4, 1, 2),
    ("interpreter", 32): Tile(16, 32, 32, 4, 4, 1, 2),
}

BLOCK_ROWS = 128  # rows a program of the (N,) kernels
BLOCK_HIDDEN = 1024  # elements of H a program of the (N, H) kernels
BLOCK_RUN = 8  # rows of one label summed at a time
ROW_WARPS = 4
