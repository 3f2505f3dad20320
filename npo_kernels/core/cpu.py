"""How matrix products of 16-bit operands are computed on a CPU.

PyTorch multiplies bfloat16 matrices on any CPU, but hundreds of times slower than float32 ones if the CPU has no
bfloat16 instructions. With such instructions the operands are multiplied directly ("native"), otherwise as float32
copies. The choice depends on the CPU and on settings of the user, never on a timing, so results are reproducible.

Native float16 products are never used: their result is float16, whose maximum of 65504 is too small for sums of
anchored exponentials. bfloat16 has the range of float32.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

# Names of bfloat16 instruction sets in torch.cpu.get_capabilities(), on x86 and ARM.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
# A value of ONEDNN_MAX_CPU_ISA permits bfloat16 instructions if it contains one of these.
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10")
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def refusal(dtype: torch.dtype) -> str | None:
    """Why products of this 16-bit dtype are not native on this CPU, in a few words; None if they are native."""
    if dtype == torch.float16:
        return "float16 ends at 65504"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]
        return "oneDNN is off"
    return _no_instructions()


@cache
def _no_instructions() -> str | None:
    """Why bfloat16 instructions are not used. Cached, since PyTorch and oneDNN also read these variables only once."""
    has = torch.cpu.get_capabilities()
    if not any(has.get(name) for name in BFLOAT16):
        return "no bfloat16 instructions"
    highest = torch.backends.cpu.get_cpu_capability()
    if highest in ("DEFAULT", "AVX2") and has["architecture"].startswith("x86"):
        return f"ATEN_CPU_CAPABILITY is {highest}"
    for name in LIMITS:
        limit = os.environ.get(name, "").upper()
        if limit not in ("", "ALL", "DEFAULT") and not any(part in limit for part in BFLOAT16_ISAS):
            return f"{name} is {limit}"
    return None


def native(t: Tensor) -> bool:
    """Whether products of operands like t are native: computed without copies, the result rounded to their dtype."""
    return t.device.type == "cpu" and t.itemsize == 2 and refusal(t.dtype) is None


def arithmetic(dtype: torch.dtype) -> str:
    """How products of this dtype are computed, as text for reports."""
    name = str(dtype).removeprefix("torch.")
    if dtype.itemsize != 2:
        return f"{name} products"
    why = refusal(dtype)
    return f"{name} products native" if why is None else f"{name} products in float32 copies ({why})"


class KindLock:
    """A lock with two kinds of holders: any number of one kind may hold it at once, but never both kinds.

    Requests are served in order, so that neither kind can starve the other.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue: deque[object] = deque()
        self.inside = {False: 0, True: 0}

    @contextmanager
    def hold(self, kind: bool) -> Iterator[None]:
        ticket = object()
        with self.changed:
            self.queue.append(ticket)
            try:
                self.changed.wait_for(lambda: self.queue[0] is ticket and not self.inside[not kind])
                self.inside[kind] += 1
            finally:  # also after a KeyboardInterrupt
                self.queue.remove(ticket)
                self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.inside[kind] -= 1
                self.changed.notify_all()


_kind_lock = KindLock()
_lock = threading.Lock()
_inside, _before = 0, ""


def _after_fork() -> None:
    """Reset the state in a forked child, where the other threads, which may hold a lock, no longer exist."""
    global _kind_lock, _lock, _inside
    if _inside:
        torch.backends.mkldnn.matmul.fp32_precision = _before  # type: ignore[attr-defined]
    _kind_lock, _lock, _inside = KindLock(), threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Context for float32 products of operands that are copies of bfloat16 ones, to be computed with bfloat16
    instructions.

    oneDNN rounds the operands back to bfloat16, which changes nothing, and accumulates in float32; the result is
    float32. The setting for this, `torch.backends.mkldnn.matmul.fp32_precision`, is process-wide, so it is set around
    single products only, and products of this package that must not be rounded wait meanwhile (`float32_products`). Not
    covered: float32 products in other threads of the caller are rounded too, and `torch.get_float32_matmul_precision`
    raises there. The first thread to enter changes the setting; the last one to leave restores it, also after an
    exception.
    """
    global _inside, _before
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _kind_lock.hold(True):
        with _lock:
            if _inside == 0:
                _before = setting.fp32_precision
                setting.fp32_precision = "bf16"
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    setting.fp32_precision = _before


def float32_products() -> AbstractContextManager[None]:
    """Context for all other float32 products on a CPU: waits while a thread is inside `bfloat16_products`."""
    return nullcontext() if refusal(torch.bfloat16) else _kind_lock.hold(False)
