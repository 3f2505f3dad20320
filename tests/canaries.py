"""Guards around everything that npo_kernels allocates: a kernel that writes past an end overwrites one.

What it allocates without a value holds NaN (or a large integer) until it is written, too.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

GUARD = 1024  # bytes on either side: more than an allocator rounds up to, and the alignment of what lies between
CANARY = 0x5A
CREATORS = (
    *((torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like")),
    *((Tensor, name) for name in ("new_empty", "new_zeros")),
)


@contextmanager
def canaries(package: str = "npo_kernels") -> Iterator[list[Tensor]]:
    """The guarded memory; its guards are looked at on leaving."""
    guarded: list[Tensor] = []
    with ExitStack() as stack:
        for owner, name in CREATORS:
            stack.enter_context(mock.patch.object(owner, name, _guarding(getattr(owner, name), guarded, package)))
        yield guarded
    for memory in guarded:
        for side, guard in (("before", memory[:GUARD]), ("after", memory[-GUARD:])):
            overwritten = int((guard != CANARY).sum())
            assert not overwritten, f"{overwritten} bytes {side} an allocation of {len(memory) - 2 * GUARD} bytes"


def _guarding(create, guarded: list[Tensor], package: str):
    empty, full = torch.empty, torch.full

    def wrapper(*args, **options):
        made = create(*args, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if type(made) is not Tensor or made.numel() == 0 or caller.split(".")[0] != package:
            return made
        size = 1 + sum((n - 1) * stride for n, stride in zip(made.shape, made.stride(), strict=True))
        memory = full((size * made.itemsize + 2 * GUARD,), CANARY, dtype=torch.uint8, device=made.device)
        guarded.append(memory)
        inner = empty(0, dtype=made.dtype, device=made.device)
        start = (memory.storage_offset() + GUARD) // made.itemsize
        inner.set_(memory.untyped_storage(), start, made.shape, made.stride())
        if "zeros" in create.__name__:
            return inner.zero_()
        return inner.fill_(torch.nan if made.is_floating_point() else 2**30 if made.dtype != torch.bool else True)

    return wrapper
