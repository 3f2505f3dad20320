"""QuACK: chunked linear cross-entropy on Hopper and later, with the scaled-exponential pipeline and without."""

from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import Provider, on_gpu, without_softcap

CHUNK = 4096  # rows, its default


def _loss(batch: Batch, scaled_exp: bool) -> Tensor:
    without_softcap(batch, "QuACK")
    on_gpu(batch, "QuACK")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        *batch.flat, chunk_size=CHUNK, ignore_index=IGNORED, reduction="mean", use_scaled_exp=scaled_exp
    )


PACKAGE = "quack-kernels"
PROVIDERS = [
    Provider("quack/scaled-exp", PACKAGE, "ce", True, lambda batch: _loss(batch, True)),
    Provider("quack/base", PACKAGE, "ce", True, lambda batch: _loss(batch, False)),
]
