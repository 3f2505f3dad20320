"""Time of providers on one batch, in one process, taking turns, so that clocks and temperature are the same for all.

CUDA events on a GPU, perf_counter on a CPU. Every turn measures three times: forward, backward, both. Warm-up turns are
left out; the reported times are medians. On a GPU the L2 cache is hot (an untimed turn of the same provider comes right
before) or cold (overwritten before).

Rates count the useful products of a mode, not the operations that a provider executes: full 6NHV, frozen head 4NHV,
log-probabilities 2NHV, with N scored tokens.
"""

import gc
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from bench.cases import Batch, Case
from bench.options import Options
from bench.providers import PROVIDERS, Provider, UnsupportedError, plan_of
from bench.records import Record, record, summary
from npo_kernels.env import installed_version

PRODUCTS = {"full": 6, "frozen": 4, "logprobs": 2}  # operations in units of NHV, forward and backward
WHOLE = {"full": "fwd_bwd", "frozen": "fwd_bwd", "logprobs": "logprobs"}


class Clock:
    """Marks in the work queue of a device, and the milliseconds between two of them."""

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.l2 = None
        if self.on_gpu:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.l2 = torch.empty(2 * max(size, 2**20), dtype=torch.int8, device=device)

    def mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, start, end) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)

    def flush(self) -> None:
        """Overwrite the L2 cache."""
        if self.l2 is not None:
            self.l2.zero_()

    def lost(self) -> bool:
        """Whether the GPU rejects all further work, as after an illegal memory access. An asynchronous error is raised
        once."""
        for _ in range(2):
            try:
                self.wait()
            except Exception:
                continue
            return False
        return True


def turn(provider: Provider, batch: Batch, clock: Clock) -> dict[str, float]:
    """One run: {what: milliseconds}."""
    with provider.setting():
        clock.wait()
        start = clock.mark()
        if batch.mode == "logprobs":
            with torch.no_grad():
                provider.run(batch)
            end = clock.mark()
            clock.wait()
            return {"logprobs": clock.milliseconds(start, end)}
        loss = provider.run(batch)
        middle = clock.mark()
        torch.autograd.grad(loss, batch.leaves)
        end = clock.mark()
        clock.wait()
    milliseconds = clock.milliseconds
    return {
        "fwd": milliseconds(start, middle),
        "bwd": milliseconds(middle, end),
        "fwd_bwd": milliseconds(start, end),
    }


@dataclass
class Failure:
    """Why there is no value: a status of the schema and the error message."""

    status: str
    error: str


def failure(error: BaseException) -> Failure:
    kinds = {
        UnsupportedError: "unsupported",
        NotImplementedError: "unsupported",
        ImportError: "missing",
        torch.OutOfMemoryError: "oom",
        MemoryError: "oom",
    }
    status = next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")
    text = f"{error}" if status in ("unsupported", "missing") else f"{type(error).__name__}: {error}"
    return Failure(status, (text.strip() or type(error).__name__).splitlines()[0][:300])


def interleaved(
    names: Iterable[str], batch: Batch, reps: int, warmup: int, cold: bool = False, seconds: float = math.inf
) -> dict[str, list[dict[str, float]] | Failure]:
    """The times of each provider's turns after `warmup` of them, or its failure.

    No round of turns begins after `seconds`, once every provider has one counted turn. If a provider leaves the GPU
    unusable for this process, all turns end: times measured before are kept, and the failure of the providers without
    a time names that provider.
    """
    clock = Clock(str(batch.hidden.device))
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, Failure] = {}
    deadline = time.monotonic() + seconds
    for number in range(warmup + reps):
        if number > warmup and time.monotonic() > deadline:
            break
        order = list(timed)
        offset = number % max(1, len(order))
        for name in order[offset:] + order[:offset]:
            if name in failed:
                continue
            try:
                if cold:
                    clock.flush()
                elif clock.on_gpu and number >= warmup:
                    turn(PROVIDERS[name], batch, clock)
                times = turn(PROVIDERS[name], batch, clock)
            except Exception as error:  # whatever a peer raises is its result
                failed[name] = failure(error)
                if clock.lost():
                    return {other: found or context_lost(name) for other, found in (timed | failed).items()}
                release(batch.hidden.is_cuda)
                continue
            if number >= warmup:
                timed[name].append(times)
    return timed | failed


def context_lost(culprit: str) -> Failure:
    return Failure("failed", f"CUDA context lost after {culprit}")


def release(on_gpu: bool) -> None:
    """Free memory that is no longer referenced, for example after a provider failed."""
    gc.collect()
    if on_gpu:
        with suppress(RuntimeError):  # the CUDA context is lost; the records made so far must survive
            torch.cuda.empty_cache()


def time_case(options: Options, case: Case, mode: str = "full", l2: str = "hot", **fields) -> Iterator[Record]:
    """Milliseconds of fwd, bwd and fwd_bwd (or logprobs) of every provider, and TFLOP/s of the whole."""
    batch = case.batch(options.torch_dtype, options.device, mode)
    yield from time_batch(options, case, batch, l2, **fields)
    del batch
    release(options.on_gpu)


def time_batch(options: Options, case: Case, batch: Batch, l2: str = "hot", **fields) -> Iterator[Record]:
    """`time_case` on an existing batch."""
    results = interleaved(
        options.provider_names, batch, options.reps, options.warmup, l2 == "cold", seconds=options.seconds
    )
    products = PRODUCTS[batch.mode] * case.N * case.head.H * case.head.V
    whole = WHOLE[batch.mode]
    for name, turns in results.items():
        common = described(options, case, name, batch.mode) | {"l2": l2 if options.on_gpu else None} | fields
        if isinstance(turns, Failure):
            yield record(options.device, **common, what=whole, metric="ms", status=turns.status, error=turns.error)
            continue
        plan = plan_of(name, batch)
        common["plan"] = None if plan is None else str(plan)
        for what in turns[0]:
            milliseconds = [times[what] for times in turns]
            yield record(options.device, **common, what=what, metric="ms", **summary(milliseconds))
            if what == whole:
                rates = [products / ms / 1e9 for ms in milliseconds]
                yield record(options.device, **common, what=what, metric="tflops", **summary(rates))


def described(options: Options, case: Case, name: str, mode: str) -> Record:
    """The fields of a record that are known before the run."""
    provider = PROVIDERS[name]
    return {
        "suite": options.suite,
        "case": case.name,
        "provider": name,
        "provider_version": installed_version(provider.package),
        "mode": mode,
        "dtype": options.dtype,
        **case.shape,
        "exact": provider.exact,
        "computes": provider.computes,
        "threads": None if options.on_gpu else torch.get_num_threads(),
        "data": case.data,
    }
