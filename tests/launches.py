"""What a call would launch on a GPU, counted without one.

Triton kernels are counted where they are launched, in the interpreter. Of PyTorch's operators those count that run a
kernel or a copy on CUDA: all but views and allocations. An operator counts once, though a sort or a cumulative sum
takes several kernels: what is stated here is a lower bound of launches, and exact where no such operator is left.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from csrc_triton.gradient_rows import scale_rows_kernel
from npo_kernels.core import execute, gradients, linear_kl, value_checks
from npo_kernels.ops import schema, token_loss

ALLOCATIONS = (
    "scalar_tensor",  # the number that `where` was given, on the host
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
)
# What makes the host wait for the device or a value of the host a copy to it: neither can be captured in a CUDA graph.
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique_dim", "_unique2")
FROM_HOST = ("lift_fresh", "lift_fresh_copy")


class Launches(TorchDispatchMode):
    """The launches made while it is active, in order; `syncs` are operations that a CUDA graph cannot capture."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.syncs: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # what an operator is made of, if it has no kernel of its own
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        if not self.paused and func.namespace == "aten":
            self._take(func, args, result)
        return result

    def _take(self, func, args, result) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name in SYNCS or name in FROM_HOST or _indexes_by_mask(name, args):
            self.syncs.append(name)
        empty = isinstance(result, Tensor) and not result.numel()
        if name not in ALLOCATIONS and not _is_view(func) and not empty:
            self.names.append(name)

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """One launch, or the call that takes its place without a GPU."""
        if not self.paused:
            self.names.append(name)
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __str__(self) -> str:
        lines = [f"{count:4d}  {name}" for name, count in Counter(self.names).items()]
        return "\n".join([f"{len(self.names)} launches, in the order in which each comes first:", *lines])


def _is_view(func) -> bool:
    if func._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias", "aten::detach"):
        return True
    alias = func._schema.returns and func._schema.returns[0].alias_info
    return bool(alias) and not alias.is_write


def _indexes_by_mask(name: str, args) -> bool:
    """Indexing with booleans asks the device for the number of them."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1])


@contextmanager
def counted(monkeypatch) -> Iterator[Launches]:
    """`with counted(monkeypatch) as launches`: of `impl="triton"`, as on a GPU, where no values are read."""
    launches = Launches()

    def alone(function, name):
        def run(*args, **kwargs):
            with launches.one(name):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def without_autocast(tensor, original=schema.without_autocast):
        # inside an operator of this package no mode is active; in an autograd.Function this one is
        with original(tensor):
            if _get_current_dispatch_mode() is None:
                with launches:
                    yield
            else:
                yield

    kernels = type(scale_rows_kernel)
    launch = kernels.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(value_checks, "readable", lambda tensor: False)
        patch.setattr(kernels, "__getitem__", lambda self, grid: alone(launch(self, grid), self.fn.__name__))
        for module in (execute, gradients, linear_kl):
            patch.setattr(module, "matmul", alone(module.matmul, "matmul"))  # one product on a GPU, blocks on a CPU
        for module in (schema, token_loss):
            patch.setattr(module, "without_autocast", without_autocast)
        with launches:
            yield launches
