"""What only many calls or many threads show: nothing is kept from call to call, no call sees another's settings."""

import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sized
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from npo_kernels import (
    fused_linear_kl,
    fused_logprob_loss,
    fused_npo_loss,
    fused_simnpo_loss,
    fused_token_loss,
    sequence_logprobs,
    set_debug,
    token_logprobs,
    token_statistics,
)
from npo_kernels.core import cpu
from npo_kernels.ops.schema import Operator
from tests import support
from tests.support import DEVICE, DTYPES, ON_GPU, TINY, make_batch

CALLS = int(os.environ.get("NPO_LONG_RUN", "1500"))  # make long-run: 10,000
WARM_UP = 500
SHAPES = min(1000, CALLS // 6)
PAGE = os.sysconf("SC_PAGE_SIZE")
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc, which is Linux's")


# ---------------------------------------------------------------------------------------------------------------------
# Many calls
# ---------------------------------------------------------------------------------------------------------------------


def call(draw: random.Random) -> None:
    """One forward and backward of shapes and options that are drawn; most of them of NPO."""
    B, S, H, V = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 12), draw.randint(2, 40)
    dtype = draw.choice(DTYPES)
    hidden = torch.rand(B, S, H, dtype=dtype, device=DEVICE, requires_grad=draw.random() < 0.9)
    weight = torch.rand(V, H, dtype=dtype, device=DEVICE, requires_grad=draw.random() < 0.7)
    labels = torch.randint(-1, V, (B, S), device=DEVICE)
    options = {
        "impl": "torch", "ignore_index": -1, "shift": draw.random() < 0.7, "softcap": draw.choice((None, 3.0)),
        "workspace_mb": draw.choice((None, None, TINY)), "logit_scale": draw.choice((1.0, 0.5)),
    }  # fmt: skip
    if draw.random() < 0.3:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.arange(B + 1, dtype=torch.int32, device=DEVICE) * S
    batch = hidden, weight, labels
    which, reduction = draw.random(), draw.choice(("mean", "sum", "none"))
    if which < 0.6:
        weights = torch.rand(B, device=DEVICE) if draw.random() < 0.3 else None
        result = fused_npo_loss(
            *batch, ref_logps=torch.zeros(B, device=DEVICE), reduction=reduction, weights=weights, **options
        )
    elif which < 0.65:
        result = fused_simnpo_loss(*batch, reduction=reduction, **options)
    elif which < 0.7:
        result = fused_logprob_loss(*batch, lambda logps, num_tokens: (logps * num_tokens).sum(), **options)
    elif which < 0.75:
        result = fused_token_loss(*batch, lambda logps, sequence, num_tokens: (logps * sequence).sum(), **options)
    elif which < 0.8:
        result = sequence_logprobs(*batch, **options)[0]
    elif which < 0.85:
        result = token_logprobs(*batch, **options)
    elif which < 0.9:
        result = sum(token_statistics(*batch, ("logp", "entropy", "var_logp"), **options).values())
    else:
        kl = {name: options[name] for name in ("impl", "softcap", "workspace_mb", "logit_scale")}
        mask = None if draw.random() < 0.5 else labels > 0
        result = fused_linear_kl(hidden, weight, hidden.detach().flip(0), weight.detach(), mask=mask, **kl)
    if result.requires_grad:
        result.sum().backward()


def kept() -> dict[str, int]:
    """How much there is of everything that a call may leave behind, without what Python counts in pages."""
    gc.collect()
    found = {
        "live tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in ("npo_kernels", "csrc_triton")]:
        for name, value in vars(module).items():
            where = f"{module.__name__}.{name}"
            if hasattr(value, "cache_info"):
                found[where] = value.cache_info().currsize
            elif isinstance(value, Sized) and not isinstance(value, (str, type)) and not name.startswith("__"):
                with suppress(TypeError):  # of a generic type, such as dict[str, int]
                    found[where] = len(value)
            elif isinstance(value, Operator):
                for attribute, part in vars(value.op).items():
                    if hasattr(part, "__len__"):
                        found[f"{where}.{attribute}"] = len(part)
    return found


def memory() -> tuple[int, int]:
    """(blocks that Python has allocated, bytes that are resident): an object a call would be a block a call."""
    gc.collect()
    return sys.getallocatedblocks(), int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@needs_proc
def test_calls_leave_nothing_behind(tried):
    draw, torch_state = random.Random(0), torch.random.get_rng_state()
    for _ in range(WARM_UP):
        call(draw)
    before, half = kept(), (CALLS - WARM_UP) // 2
    found = [memory()]
    for _ in range(2):
        for _ in range(half):
            call(draw)
        found.append(memory())
    assert kept() == before
    # what each call leaves is left in both halves; tables of Python that grow now and then grow in one of them
    more_blocks, more_resident = (min(b - a, c - b) for a, b, c in zip(*found, strict=True))
    assert more_blocks < half / 2 and more_resident < 2**21, found
    assert any(name.startswith("npo_kernels") for name in before)
    torch.random.set_rng_state(torch_state)
    tried("calls in a row", CALLS)


# ---------------------------------------------------------------------------------------------------------------------
# Many shapes
# ---------------------------------------------------------------------------------------------------------------------


def test_torch_compile_stops_compiling():
    """30 shapes: the first few of them make sizes dynamic, and no later one is compiled anew."""
    counter = CompileCounter()

    def loss(hidden, weight, labels, ref_logps):
        return fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, impl="torch")

    torch._dynamo.reset()
    compiled, frames = torch.compile(loss, backend=counter, fullgraph=True), []
    for i in range(30):
        B, S = 2 + i % 5, 3 + i
        batch = torch.rand(B, S, 8, requires_grad=True), torch.rand(20, 8), torch.randint(20, (B, S)), torch.zeros(B)
        assert torch.equal(compiled(*batch), loss(*batch))
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames[-1] == frames[3] <= 3, frames


SPECIALIZATIONS = """
import collections, json, random, sys, torch
from bench.certify.specializations import collecting, pretend_sm_90
from tests import support
from tests.support import make_batch
pretend_sm_90()
draw, counts = random.Random(0), []

def launch(H, V):
    lengths = [draw.randint(0, 40) for _ in range(draw.randint(1, 5))]
    batch = make_batch(torch.bfloat16, "all", lengths=lengths, prompts=[n // 3 for n in lengths], H=H, V=V)
    for objective, needs in ((support.npo, ("hidden", "weight")), (support.sequences, ("hidden",))):
        support.evaluate(objective, batch.packed() if draw.random() < 0.5 else batch, needs, impl="triton")

with collecting() as found:
    for _ in range(int(sys.argv[1])):
        launch(16, 50)
        counts.append(len(found))
print(json.dumps([counts, collections.Counter(s.kernel for s in found)]))
"""


def test_kernels_are_compiled_for_few_shapes(tried):
    """One model, batches of all shapes, in a process that does not interpret: what Triton would have compiled.

    It tells sizes that are 1, divisible by 16 and all others apart, and a kernel has its own settings beside.
    """
    run = subprocess.run(
        [sys.executable, "-c", SPECIALIZATIONS, str(SHAPES)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts, of_each = json.loads(run.stdout.splitlines()[-1])
    assert len(counts) == SHAPES and counts[-1] == counts[SHAPES * 4 // 5] < 60, counts[::20]
    assert max(of_each.values()) <= 9, of_each
    tried("shapes specialised", SHAPES)


# ---------------------------------------------------------------------------------------------------------------------
# Many threads
# ---------------------------------------------------------------------------------------------------------------------


def settings(impl):
    """name -> a call with settings of its own, that returns its tensors."""

    def one(objective, dtype, needs=("hidden", "weight"), autocast=None, grad=True, **options):
        batch = make_batch(dtype, lengths=(5, 1, 0, 7), prompts=(1, 0, 0, 0), H=16, V=60, spread=3.0)
        casts = torch.autocast(DEVICE, dtype=autocast) if autocast else nullcontext()

        def run():
            with torch.set_grad_enabled(grad), casts:
                return list(support.evaluate(objective, batch, needs if grad else (), impl=impl, **options).values())

        return run

    def debug():
        for enabled in (True, False):
            set_debug(enabled)
        return one(support.npo, torch.float32)()

    return [
        one(support.npo, torch.float32),
        one(support.npo, torch.bfloat16),
        one(support.npo, torch.float16, ("hidden",), workspace_mb=TINY),
        one(support.tokens, torch.float32, autocast=torch.bfloat16),
        one(support.user_loss, torch.bfloat16, workspace_mb=TINY),
        one(support.statistics, torch.float32, grad=False),
        one(support.simnpo, torch.bfloat16, grad=False),
        debug,
    ]


def in_threads(calls, rounds):
    """What calls in threads of their own did not do as they do alone."""
    expected, failures, ready = [call() for call in calls], [], threading.Barrier(len(calls))

    def work(number):
        ready.wait(60)
        for _ in range(rounds):
            try:
                found = calls[number]()
                assert all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)), "other bits"
            except Exception as error:
                failures.append((number, repr(error)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads meet inside every call
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    return failures


def test_threads_with_other_settings_get_the_bits_of_a_single_one(tried):
    assert not in_threads(settings("torch"), 10)
    tried("calls in eight threads", 80)


def test_native_products_round_no_other_thread_s(monkeypatch):
    """A CPU with bfloat16 instructions, pretended: there the setting of the process would round float32 products."""
    monkeypatch.setattr(cpu, "_no_instructions", lambda: None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    setting, mm = torch.backends.mkldnn.matmul, torch.mm
    before = setting.fp32_precision

    def rounding(a, b, **options):
        """As oneDNN does there; the setting is looked at twice, before other threads run and after them."""
        rounded = setting.fp32_precision == "bf16"
        os.sched_yield()
        if a.dtype == torch.float32 and (rounded or setting.fp32_precision == "bf16"):
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return mm(a, b, **options)

    monkeypatch.setattr(torch, "mm", rounding)
    assert not in_threads(settings("torch"), 10)
    assert setting.fp32_precision == before


def test_threads_launch_kernels(monkeypatch, tried):
    """The interpreter keeps the program's indices and Triton's patched functions for the process: it can do one launch
    at a time. What is around the launches runs side by side.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not ON_GPU:
        launch, lock = interpreter.GridExecutor.__call__, threading.Lock()

        def alone(self, *args, **kwargs):
            with lock:
                return launch(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone)
    calls = settings("triton")
    assert not in_threads([calls[0], calls[2], calls[4], calls[6]], 1)
    tried("calls in four threads", 4)
