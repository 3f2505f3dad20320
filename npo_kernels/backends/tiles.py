"""Which entry of `csrc_triton.tiles` a call takes: of its architecture, the width of its operands, its hidden size.

Never of the number of rows, which would let the log-probability of a row depend on its batch.
"""

from collections.abc import Mapping

from csrc_triton.tiles import ANY_HIDDEN, HIDDEN_BUCKETS, Tile

Table = Mapping[tuple[str, int, int], Tile]


def hidden_bucket(hidden_size: int) -> int:
    """The hidden size that stands for this one: the next bucket, or the last."""
    return next((bucket for bucket in HIDDEN_BUCKETS if hidden_size <= bucket), HIDDEN_BUCKETS[-1])


def find_tile(table: Table, architecture: str, bits: int, hidden_size: int) -> Tile:
    """What was measured for the bucket of the hidden size, or what holds for every one that was not."""
    found = table.get((architecture, bits, hidden_bucket(hidden_size)))
    return table[architecture, bits, ANY_HIDDEN] if found is None else found
