"""Guards around everything that npo_kernels allocates: a kernel that writes past an end overwrites one.

What it allocates without a value holds NaN (or a large integer) until it is written, too.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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


class Guarded:
    """The same around the caller's tensors: NaN before, after and between the rows, which must stay NaN."""

    def __init__(self, pad: int = 16):
        self.pad = pad  # elements between two rows, half of them before the first; 16: as tensor descriptors want it
        self.made: list[tuple[Tensor, Tensor]] = []  # (memory, what belongs to the caller of it)

    def __call__(self, t: Tensor | None) -> Tensor | None:
        """The values of t, as a view of a larger memory."""
        if t is None or t.ndim == 0:
            return t
        fill = torch.nan if t.is_floating_point() else 2**30
        rows = t.shape[:-1].numel() if t.ndim > 1 else 1
        memory = torch.full((rows + 2, t.shape[-1] + self.pad), fill, dtype=t.dtype, device=t.device)
        view = memory[1:-1, self.pad // 2 : self.pad // 2 + t.shape[-1]]
        outside = torch.ones(memory.shape, dtype=torch.bool, device=t.device)
        outside[1:-1, self.pad // 2 : self.pad // 2 + t.shape[-1]] = False
        self.made.append((memory, outside))
        view.copy_(t.detach().reshape(rows, -1))
        return view[0] if t.ndim == 1 else view.unflatten(0, t.shape[:-1])

    def leaves(self, batch, needs=()):
        """A batch whose every tensor is such a view, those in `needs` requiring grad."""
        names = ("hidden", "weight", "bias", "labels", "ref_logps", "cu_seqlens")
        views = {name: self(getattr(batch, name)) for name in names}
        for name in needs:
            views[name].requires_grad_()
        return replace(batch, **views)

    def evaluate(self, objective, batch, needs=(), **options) -> dict[str, Tensor]:
        """The loss and the gradients named in `needs`."""
        batch = self.leaves(batch, needs)
        loss = objective(batch, **options)
        grads = torch.autograd.grad(loss, [batch.tensors[name] for name in needs]) if needs else ()
        return {"loss": loss.detach(), **dict(zip(needs, grads, strict=True))}

    def check(self) -> None:
        """Nothing has been written between them."""
        assert self.made
        for memory, outside in self.made:
            left = memory[outside]
            whole = left.isnan() if memory.is_floating_point() else left == 2**30
            assert whole.all(), f"{int((~whole).sum())} elements around an argument of {tuple(memory.shape)}"
