"""Cut Cross Entropy: as it comes (gradients below a threshold are dropped: inexact), and without that filter."""

from typing import Any

import torch
from torch import Tensor

from bench.cases import IGNORED, Batch
from bench.providers.base import UnsupportedError, from_tokens, on_gpu

NAME = "Cut Cross Entropy"


def _tokens(batch: Batch, **options: Any) -> Tensor:
    if batch.hidden.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(f"{NAME} has gradients in 16 bits alone")
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        batch.hidden,
        batch.weight,
        batch.labels,
        ignore_index=IGNORED,
        softcap=batch.softcap,
        reduction="none",
        **options,
    )
    return -nll.view(batch.labels.shape)


def default_tokens(batch: Batch) -> Tensor:
    on_gpu(batch, NAME)
    return _tokens(batch)


def exact_tokens(batch: Batch) -> Tensor:
    """Newer releases have a preset for this; in older ones the filter can only be turned off."""
    on_gpu(batch, NAME)
    try:
        import cut_cross_entropy.cce_utils as presets  # noqa: F401
    except ImportError:
        return _tokens(batch, filter_eps=None)
    return _tokens(batch, impl="cce_exact")


PACKAGE = "cut-cross-entropy"
PROVIDERS = [
    from_tokens("cce/default", PACKAGE, default_tokens, exact=False),
    from_tokens("cce/exact", PACKAGE, exact_tokens),
]
