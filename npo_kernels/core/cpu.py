"""Products of 16-bit operands on a CPU: which arithmetic they take, and why.

PyTorch multiplies bfloat16 matrices on any CPU, but without instructions for it hundreds of times slower than float32
ones. Where there are such instructions the operands are multiplied as they are ("native"), elsewhere in float32 copies.
What decides is what the CPU has and what the user has switched off, never a timing: a result's bits do not depend on
chance.

Native products of float16 are not used, whatever the CPU has: their result is float16 and ends at 65504, which sums of
anchored exponentials pass. Those of bfloat16 have the range of float32.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

# What instructions for bfloat16 are called by torch.cpu.get_capabilities: x86, and ARM.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
# What the values of ONEDNN_MAX_CPU_ISA that allow them have in their names.
ALLOWING = ("BF16", "FP16", "AMX", "AVX10")
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def refusal(dtype: torch.dtype) -> str | None:
    """Why products of operands of this 16-bit dtype are not native on this CPU, in a few words; None if they are."""
    if dtype == torch.float16:
        return "float16 ends at 65504"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[no-untyped-call]
        return "oneDNN is off"
    return _no_instructions()


@cache
def _no_instructions() -> str | None:
    """What keeps bfloat16 instructions from being used. PyTorch and oneDNN read these variables once as well."""
    has = torch.cpu.get_capabilities()
    if not any(has.get(name) for name in BFLOAT16):
        return "no bfloat16 instructions"
    highest = torch.backends.cpu.get_cpu_capability()
    if highest in ("DEFAULT", "AVX2") and has["architecture"].startswith("x86"):
        return f"ATEN_CPU_CAPABILITY is {highest}"
    for name in LIMITS:
        limit = os.environ.get(name, "").upper()
        if limit not in ("", "ALL", "DEFAULT") and not any(part in limit for part in ALLOWING):
            return f"{name} is {limit}"
    return None


def native(t: Tensor) -> bool:
    """Whether products of t with its like are taken of the operands as they are, and rounded to their dtype."""
    return t.device.type == "cpu" and t.itemsize == 2 and refusal(t.dtype) is None


def arithmetic(dtype: torch.dtype) -> str:
    """In words, for people."""
    name = str(dtype).removeprefix("torch.")
    if dtype.itemsize != 2:
        return f"{name} products"
    why = refusal(dtype)
    return f"{name} products native" if why is None else f"{name} products in float32 copies ({why})"


class Turns:
    """Work of two kinds by many threads: side by side with its own kind, never with the other. First come, first
    served, so that neither kind can keep the other out.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue: deque[object] = deque()
        self.inside = {False: 0, True: 0}

    @contextmanager
    def of(self, kind: bool) -> Iterator[None]:
        ticket = object()
        with self.changed:
            self.queue.append(ticket)
            try:
                self.changed.wait_for(lambda: self.queue[0] is ticket and not self.inside[not kind])
                self.inside[kind] += 1
            finally:  # an interrupt, too
                self.queue.remove(ticket)
                self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self.inside[kind] -= 1
                self.changed.notify_all()


_turns = Turns()
_lock = threading.Lock()
_inside, _before = 0, ""


def _after_fork() -> None:
    """In the child no other thread goes on: what they had begun ends here."""
    global _turns, _lock, _inside
    if _inside:
        torch.backends.mkldnn.matmul.fp32_precision = _before  # type: ignore[attr-defined]
    _turns, _lock, _inside = Turns(), threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Around float32 products of copies of bfloat16 operands: oneDNN rounds them back, which changes nothing, and
    multiplies with bfloat16 instructions, which sum in float32; the result is float32.

    `torch.backends.mkldnn.matmul.fp32_precision` belongs to the process. So it is set around single products, and those
    of this package that are not to be rounded wait meanwhile (`float32_products`). What no lock of ours reaches are the
    float32 products of a caller's other threads, which are rounded too, and `torch.get_float32_matmul_precision`, which
    raises there. The first thread in sets it and the last one out restores what it was, also when a product raises.
    """
    global _inside, _before
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _turns.of(True):
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
    """Around every other float32 product on a CPU: not while another thread has the setting of `bfloat16_products`."""
    return nullcontext() if refusal(torch.bfloat16) else _turns.of(False)
