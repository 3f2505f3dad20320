"""Tile shapes of `exp_logits` and `kl_logits` per architecture, operand width and hidden size: pure data.

tests/aot compiles every entry ahead of time for its architecture and records registers, spills and shared memory. No
entry depends on N, so the log-probability of a row does not depend on N either. Nothing is tuned at import or at the
first call: `python -m bench tune --write` measures on a GPU and edits this file. `npo_kernels.backends.tiles` selects
the entry of a call.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """One piece of work is block_n rows x (split_tiles * block_v) columns of logits; a step over H is block_h deep.

    The epilogue processes a tile in `pieces` parts of block_v / pieces columns.

    `loop` selects the kernel. "": `exp_logits_kernel`, whose programs do one split each. Otherwise it is how a program
    of `exp_logits_persistent_kernel` goes from tile to tile: "serial"; "flat", where a tile's loads start before the
    previous tile is finished; or "specialized", where separate warps do the loads (sm_100).
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
        """Columns of one partial sum. A vocabulary slice that is summed must start at a multiple of it."""
        return self.block_v * self.split_tiles


# Hidden sizes that share an entry: up to 1024, up to 2048, up to 4096, and all above. The larger H is, the smaller is
# the share of the epilogue, so the best tile depends on H. Buckets without an entry of their own use ANY_HIDDEN.
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
    # small, so that small test shapes cover several row blocks, tiles, splits and pieces
    ("interpreter", 16, ANY_HIDDEN): Tile(16, 64, 32, 2, 4, 1, 2, 2),
    ("interpreter", 32, ANY_HIDDEN): Tile(16, 64, 32, 2, 4, 1, 2, 2),
}

# Evidence for the entry of a hidden bucket: the result file of a sweep in which the tile was a finalist. Entries that
# are not listed were chosen by register and spill counts (tests/aot), not by a measurement.
MEASURED = {
    ("sm_90", 16, 1024): "bench/results/h100_1/tune.json",
    ("sm_90", 16, 2048): "bench/results/h100_1/tune.json",
    ("sm_90", 16, 4096): "bench/results/h100_1/tune.json",
}

# Tiles of `kl_logits` and `softmax_sums`: narrower, because `kl_logits` holds two accumulators.
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
    ("sm_100", 32, ANY_HIDDEN): Tile(64, 64, 16, 16, 8, 4),  # with block_h 32 some variants spill
    ("sm_120", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 4),
    ("gfx942", 32, ANY_HIDDEN): Tile(64, 64, 32, 16, 8, 2),
    ("interpreter", 16, ANY_HIDDEN): Tile(16, 32, 32, 4, 4, 1, 2),
    ("interpreter", 32, ANY_HIDDEN): Tile(16, 32, 32, 4, 4, 1, 2),
}

# Candidate tiles of `exp_logits_persistent_kernel`, for every hidden size. They are compiled ahead of time like the
# entries of TILES and included in the sweep of `python -m bench tune`. A call uses one only after it was measured and
# entered in TILES, as was the one for sm_90 at 4096 (with one stage less). There are none for 32-bit operands: an IEEE
# float32 product reads its operands from shared memory through registers, and with the layout of a descriptor even the
# best of these tiles spill.
PERSISTENT_CANDIDATES = {
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 256, 64, 4, 8, 4, pieces=4, loop="flat"),
    ("sm_100", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 4, pieces=2, loop="specialized"),
    ("sm_120", 16, ANY_HIDDEN): Tile(128, 128, 64, 8, 8, 3, pieces=2, loop="flat"),
}

# The same for `softmax_sums_persistent_kernel` and `kl_logits_persistent_kernel`.
PERSISTENT_PAIR_CANDIDATES = {
    ("sm_90", 16, ANY_HIDDEN): Tile(128, 64, 64, 16, 8, 4, loop="flat"),
}

# The counterpart of MEASURED for PAIR_TILES. A tile of a persistent kernel is allowed in PAIR_TILES only if it is here.
PAIR_MEASURED: dict[tuple[str, int, int], str] = {}

# The row moment kernels use the entries of TILES, but always 8 warps: with four, six sums per row do not fit in the
# registers beside the tile.
MOMENT_WARPS = 8
# By operand width in bits: the factor by which `moment_gradient_kernel` divides the pieces further, because it reads
# six row vectors for each piece.
GRADIENT_PIECES = {16: 1, 32: 2}
# Loop of `row_moments_persistent_kernel`: "serial" or "flat", as in `Tile.loop`. Without an entry `row_moments_kernel`
# runs. Entries are added only after a measurement.
MOMENT_LOOPS: dict[tuple[str, int, int], str] = {}
# The counterpart of MEASURED for MOMENT_LOOPS.
MOMENT_MEASURED: dict[tuple[str, int, int], str] = {}

BLOCK_POSITIONS = 1024  # positions (scored or not) per program of the compaction kernels
POSITION_WARPS = 8  # warps of the compaction kernels: with four, one of them spills under Triton 3.6
BLOCK_ROWS = 128  # rows per program of the (N,) kernels
BLOCK_HIDDEN = 1024  # elements of H per program of the (N, H) kernels
BLOCK_SCALED = 4096  # elements per program of scale_gradient_kernel
BLOCK_RUN = 8  # rows with the same label that add_targets_kernel sums at a time
ROW_WARPS = 4
