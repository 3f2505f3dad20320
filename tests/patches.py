"""Two patches that make small tests find more: uninitialised memory holds NaN, and the torch path has several
blocks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """A result that a kernel forgets to write is NaN instead of whatever the allocator left there."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(create):
    """`create`, but memory that npo_kernels allocates with it holds NaN (or a large integer) until it is written."""

    def wrapper(*args, **kwargs):
        made = create(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if type(made) is torch.Tensor and caller.split(".")[0] == "npo_kernels":
            made.detach().fill_(torch.nan if made.is_floating_point() else 2**30)
        return made

    return wrapper


@contextmanager
def small_blocks() -> Iterator[None]:
    """The torch path cut into blocks that small tests have several of, ragged ones included."""
    from npo_kernels.backends.torch import blocks, rows
    from npo_kernels.core import execute, gradients, matmul

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_V", 64)
        patch.setattr(blocks, "BLOCK_N", 16)
        patch.setattr(blocks, "CACHED_ROWS", 5)
        for name, value in {"BLOCK_K": 24, "BLOCK_M": 24, "COPY_ELEMENTS": 700}.items():
            patch.setattr(matmul, name, value)
        for module in (execute, gradients):
            patch.setattr(module, "GRAD_SLICE", 72)
        patch.setattr(rows, "SCALED_ROWS", 72)
        yield
