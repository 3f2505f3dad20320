"""The specialisations of kernels that calls would launch, found without compiling, compiled by many processes at once.

Triton asks a hook before it compiles. Here the hook writes down what was asked for and forbids it, so the call goes on
without launching: results are what was in memory, and nothing looks at them. The list is then compiled, each entry as
the JIT would, into Triton's cache on the disk, where every later process finds it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import get_context
from typing import NamedTuple
from unittest import mock

import torch


class Specialization(NamedTuple):
    """A kernel and what Triton's `JITFunction.preload` takes."""

    module: str
    kernel: str
    data: str


class Compiled(NamedTuple):
    kernel: str
    seconds: float
    error: str | None


@contextmanager
def rows_without_kernels() -> Iterator[None]:
    """How many rows there are is read from what the kernels of compaction write, and decides what is launched after
    them: they are launched, and the rows come from PyTorch.
    """
    from npo_kernels.backends import torch as in_pytorch
    from npo_kernels.backends import triton as backend

    launched = backend.compact

    def compact(labels, cu_seqlens, shift, vocab_size, ignore_index, num_rows):
        batch = labels, cu_seqlens, shift, vocab_size, ignore_index
        # with a bound nothing is read back: memory that no kernel wrote may hold any number
        launched(*batch, labels.numel() if num_rows is None else num_rows)
        return in_pytorch.compact(*batch, num_rows)

    with mock.patch.object(backend, "compact", compact):
        yield


@contextmanager
def collecting(each: Callable[[Specialization], object] | None = None) -> Iterator[dict[Specialization, None]]:
    """Launches are written down, once each, and do not happen; `each` is told of every new one."""
    import triton

    found: dict[Specialization, None] = {}

    def hook(*, fn, compile, **_) -> bool:
        specialization = Specialization(fn.module, fn.name, compile["specialization_data"])
        if specialization not in found:
            found[specialization] = None
            if each is not None:
                each(specialization)
        return True  # do not compile

    with triton.knobs.runtime.scope(), rows_without_kernels():
        triton.knobs.runtime.jit_cache_hook = hook
        yield found


def collect(calls: Iterable[Callable[[], object]]) -> list[Specialization]:
    """Of all calls."""
    with collecting() as found:
        for call in calls:
            call()
    return list(found)


def compile_one(specialization: Specialization) -> Compiled:
    """In a worker: into the cache on the disk, with the stub that launches it where there is a device."""
    start, error = time.monotonic(), None
    try:
        function = getattr(import_module(specialization.module), specialization.kernel)
        kernel = function.preload(specialization.data)
        if torch.cuda.is_available():
            kernel.run  # noqa: B018  # a property: builds the stub and loads the code
    except Exception as failure:  # the compiler's own, or out of shared memory: the report says so
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return Compiled(specialization.kernel, time.monotonic() - start, error)


class Compilers:
    """Processes that compile. Made before this process touches a GPU: a fork of one that did is of no use."""

    def __init__(self, jobs: int | None = None):
        self.jobs = jobs or len(os.sched_getaffinity(0))
        self.pending: list[Future[Compiled]] = []
        self.pool = ProcessPoolExecutor(self.jobs, mp_context=get_context("fork"))
        self.pool.submit(int).result()  # forks them all

    def submit(self, specialization: Specialization) -> None:
        """Compiled from now on; `finish` waits for it."""
        self.pending.append(self.pool.submit(compile_one, specialization))

    def finish(self, seconds: float | None = None) -> list[Compiled]:
        """Of those submitted, a line each as they are done. After `seconds` the others are given up, and what is in the
        cache on the disk by then stays there.
        """
        futures, self.pending = self.pending, []
        found = []
        with suppress(TimeoutError):
            for future in as_completed(futures, seconds):
                found.append(future.result())
                print(f"{found[-1].seconds:6.1f} s  {found[-1].kernel}  {found[-1].error or ''}", flush=True)
        for future in futures:
            future.cancel()
        return found

    def compile(self, specializations: Iterable[Specialization]) -> list[Compiled]:
        """All of them, whatever the time."""
        for specialization in specializations:
            self.submit(specialization)
        return self.finish()

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def pretend_sm_90() -> None:
    """Without a GPU: calls on CPU tensors specialise and compile as they would on a Hopper one. For good; launching
    would not work, so this is for `collect` and `compile_one` alone.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from npo_kernels.backends.triton import launch
    from npo_kernels.call import prepare

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    for module, name, answer in (
        (launch, "architecture", lambda device: "sm_90"),
        (launch, "processors", lambda device: 132),
        (prepare, "resolve_impl", lambda impl, device: "triton" if impl == "auto" else impl),
    ):
        mock.patch.object(module, name, answer).start()
