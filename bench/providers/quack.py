"""QuACK: chunked linear cross-entropy on Hopper and later, with the scaled-exponential pipeline and without.

Each runs with chunks of its default size, and the fastest pipeline also with all rows in one chunk, as in its published
figures. The products of the other pipeline are tuned only on request: three of them, 44 candidates each, compile for
minutes.
"""

from functools import partial

from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import Provider, UnsupportedError, on_gpu, without_softcap

CHUNK = 4096  # rows, its default
ROW_TILE = 128  # rows of a tile: chunks of the scaled-exponential pipeline are multiples


def chunk_rows(rows: int, hidden_size: int, whole: bool) -> int:
    """Halved until no chunk, including the padded last one, has as many rows as hidden units. Version 0.6.5 fails on
    such square chunks, also with its default of 4096 at the head of Llama-3-8B, as it cannot tell the two sides
    apart."""
    chunk = padded(rows) if whole else CHUNK
    while hidden_size in (min(chunk, padded(rows)), padded(rows % chunk)):
        chunk = padded(chunk // 2)
    return chunk


def padded(rows: int) -> int:
    return -(-rows // ROW_TILE) * ROW_TILE


def loss(batch: Batch, scaled_exp: bool = False, whole: bool = False, tuned: bool = False) -> Tensor:
    without_softcap(batch, "QuACK")
    on_gpu(batch, "QuACK")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, scaled_exp_lce_supported

    hidden, weight, labels = batch.flat
    rows = labels.numel()
    chunk = chunk_rows(rows, hidden.shape[-1], whole) if scaled_exp else CHUNK
    if scaled_exp and not scaled_exp_lce_supported(hidden, weight, chunk, "mean"):
        raise UnsupportedError("QuACK's scaled-exponential pipeline takes bfloat16 on Hopper and V % 128 == 0")
    if not scaled_exp and any(size % 8 for size in (rows, *weight.shape)):
        raise UnsupportedError("QuACK takes multiples of 8 rows, columns and hidden units")
    return chunked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        chunk_size=chunk,
        ignore_index=IGNORED,
        reduction="mean",
        tuned=tuned,
        use_scaled_exp=scaled_exp,
    )


PACKAGE = "quack-kernels"
PROVIDERS = [
    Provider("quack/scaled-exp", PACKAGE, "ce", True, partial(loss, scaled_exp=True)),
    Provider("quack/scaled-exp-whole", PACKAGE, "ce", True, partial(loss, scaled_exp=True, whole=True)),
    Provider("quack/base", PACKAGE, "ce", True, loss),
    Provider("quack/base-tuned", PACKAGE, "ce", True, partial(loss, tuned=True)),
]
