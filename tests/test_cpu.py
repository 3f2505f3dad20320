"""Products of 16-bit operands on CPUs: which arithmetic is used, and that the native one has the documented accuracy.

This machine may have no bfloat16 instructions. PyTorch can still multiply bfloat16, slowly, so the native path is
forced on small shapes. The effect of `fp32_precision` in oneDNN on a CPU that has them is not tested here.
"""

import os
import signal
import threading
import time
from types import MappingProxyType

import pytest
import torch

from npo_kernels import explain, fused_linear_kl, fused_npo_loss, sequence_logprobs
from npo_kernels.backends.choose import backend_of
from npo_kernels.core import cpu, matmul
from npo_kernels.ops import gradients
from tests import support
from tests.support import TINY, evaluate, make_batch, npo, relative_error

NEEDS = ("hidden", "weight", "bias")
SETTING = torch.backends.mkldnn.matmul


@pytest.fixture
def native(monkeypatch):
    """bfloat16 products as on a CPU with instructions for it."""
    monkeypatch.setattr(cpu, "_no_instructions", lambda: None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)


@pytest.fixture
def machine(monkeypatch):
    """A CPU with and without instructions, including the environment variables."""

    def make(capability="AVX512", variables=None, **has):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType({"architecture": "x86_64"} | has))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        for name in cpu.LIMITS:
            monkeypatch.delenv(name, raising=False)
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        cpu._no_instructions.cache_clear()

    yield make
    monkeypatch.undo()
    cpu._no_instructions.cache_clear()


@pytest.mark.parametrize(
    ("capability", "variables", "has", "expected"),
    [
        ("AVX512", {}, {"avx512_bf16": True}, None),
        ("AVX512", {}, {"amx_bf16": True, "avx512_bf16": False}, None),
        ("DEFAULT", {}, {"bf16": True, "architecture": "arm64"}, None),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, {"avx512_bf16": True}, None),
        ("AVX2", {}, {"avx512_bf16": False}, "no bfloat16 instructions"),
        ("AVX512", {}, {}, "no bfloat16 instructions"),
        ("AVX2", {}, {"avx512_bf16": True}, "ATEN_CPU_CAPABILITY is AVX2"),
        ("AVX512", {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, {"amx_bf16": True}, "ONEDNN_MAX_CPU_ISA is AVX512_CORE"),
    ],
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_what_the_cpu_has_and_the_user_switched_off_decide(machine, capability, variables, has, expected):
    machine(capability, variables, **has)
    assert cpu.refusal(torch.bfloat16) == expected
    assert cpu.refusal(torch.float16) == "float16 ends at 65504"
    with torch.backends.mkldnn.flags(enabled=False):
        assert cpu.refusal(torch.bfloat16) == "oneDNN is off"


def test_the_plan_says_which_arithmetic(native):
    for dtype, words in {
        torch.float32: "float32 products",
        torch.bfloat16: "bfloat16 products native",
        torch.float16: "float16 products in float32 copies (float16 ends at 65504)",
    }.items():
        batch = make_batch(dtype)
        assert words in str(explain(sequence_logprobs, batch.hidden, batch.weight, batch.labels, impl="torch"))
    assert backend_of("torch").slab_dtype(make_batch(torch.bfloat16).hidden) == torch.bfloat16
    assert backend_of("torch").slab_dtype(make_batch(torch.float16).hidden) == torch.float32


@pytest.mark.parametrize("workspace_mb", [None, TINY], ids=["slab", "slices"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("objective", [npo, support.user_loss, support.tokens], ids=lambda f: f.__name__)
def test_native_products_cost_no_more_than_plain_pytorch(native, small_blocks, objective, head, workspace_mb):
    batch = make_batch(torch.bfloat16, head, lengths=(30, 1, 0, 24, 12))
    needs = NEEDS if head == "all" else NEEDS[:2]
    plain, oracle = support.evaluate_plain_and_oracle(objective, batch, needs)
    ours = evaluate(objective, batch, needs, impl="torch", workspace_mb=workspace_mb)
    support.assert_no_worse_than_plain(ours, plain, oracle)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_log_probabilities_come_from_float32_sums(native, poisoned_allocations, spread):
    batch = make_batch(torch.bfloat16, V=9000, spread=spread)
    exact = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")[0]
    for needs in ((), ("hidden",), ("hidden", "weight")):
        leaves = batch.leaves(needs)
        _, stats = leaves(fused_npo_loss, ref_logps=batch.ref_logps, impl="torch", return_stats=True)
        assert relative_error(stats.logps, exact) < 1e-5 / 5


def test_kl_of_native_products(native, small_blocks):
    batch = make_batch(torch.bfloat16)
    arguments = batch.hidden, batch.weight, batch.hidden.flip(0), batch.weight

    def loss(impl, dtype):
        leaves = [t.detach().to(dtype).requires_grad_(i < 2) for i, t in enumerate(arguments)]
        return torch.autograd.grad(fused_linear_kl(*leaves, impl=impl), leaves[:2])

    ours, exact = loss("torch", torch.bfloat16), loss("reference", torch.float64)
    for got, expected in zip(ours, exact, strict=True):
        assert relative_error(got, expected) < 2**-8


@pytest.mark.parametrize("accumulate", [None, False, True], ids=["new", "written", "added"])
@pytest.mark.parametrize("path", ["native", "copies", "float32"])
def test_a_product_is_rounded_once_where_native_and_nowhere_else(monkeypatch, small_blocks, path, accumulate):
    monkeypatch.setattr(cpu, "_no_instructions", lambda: None if path == "native" else "none here")
    dtype = torch.float32 if path == "float32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, n, generator=generator).to(dtype) for n in (57, 9))
    exact, out = a.t().double() @ b.double(), torch.full((57, 9), 3.0 if accumulate else torch.nan)
    found = matmul.matmul(a.t(), b) if accumulate is None else matmul.matmul(a.t(), b, out, accumulate)
    assert found.dtype == torch.float32 and (accumulate is None or found is out)
    error = relative_error(found - (3.0 if accumulate else 0.0), exact)
    assert 1e-4 < error < 2**-8.5 if path == "native" else error < 1e-6


@pytest.mark.parametrize("inside", ["tf32", "ieee"])
def test_the_setting_is_restored(inside):
    """By the last thread that leaves, whichever entered first; also when a product raises."""
    before, entered, leave = SETTING.fp32_precision, threading.Event(), threading.Event()

    def other():
        with cpu.bfloat16_products():
            entered.set()
            leave.wait(10)

    try:
        SETTING.fp32_precision = inside
        thread = threading.Thread(target=other)
        with pytest.raises(RuntimeError, match="shapes"), cpu.bfloat16_products():
            assert SETTING.fp32_precision == "bf16"
            thread.start()
            assert entered.wait(10)
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        assert SETTING.fp32_precision == "bf16"  # the other thread is inside
        leave.set()
        thread.join()
        assert SETTING.fp32_precision == inside
    finally:
        leave.set()
        SETTING.fp32_precision = before


def test_products_of_float32_wait_for_the_setting_of_other_threads(native):
    """They would be rounded. Native products wait for them; products of one kind run concurrently."""
    a, inside, leave, done = torch.rand(3, 4), threading.Event(), threading.Event(), []

    def hold(kind):
        with kind():
            inside.set()
            assert leave.wait(10)

    def multiply(dtype):
        matmul.project(a.to(dtype), a.to(dtype), torch.empty(3, 3))
        done.append(dtype)

    for kind, first, second in (
        (cpu.bfloat16_products, torch.bfloat16, torch.float32), (cpu.float32_products, torch.float32, torch.bfloat16),
        (cpu.bfloat16_products, torch.bfloat16, torch.float16), (cpu.float32_products, torch.float16, torch.bfloat16),
    ):  # fmt: skip
        inside.clear(), leave.clear(), done.clear()
        holder, free, waiting = (
            threading.Thread(target=hold, args=(kind,)), *(threading.Thread(target=multiply, args=(dtype,))
                                                            for dtype in (first, second)),
        )  # fmt: skip
        holder.start()
        assert inside.wait(10)
        free.start()
        free.join(10)
        waiting.start()
        waiting.join(0.05)
        assert done == [first] and waiting.is_alive()
        leave.set()
        for thread in (holder, waiting):
            thread.join(10)
        assert done == [first, second]
    assert not cpu._kind_lock.queue and not any(cpu._kind_lock.inside.values())


def test_the_setting_is_bfloat16_during_the_products_of_logits_alone(native, monkeypatch):
    seen, mm = [], torch.mm

    def spy(a, *args, **options):
        seen.append((a.dtype, SETTING.fp32_precision))
        return mm(a, *args, **options)

    monkeypatch.setattr(torch, "mm", spy)
    before = SETTING.fp32_precision
    evaluate(npo, make_batch(torch.bfloat16), NEEDS[:2], impl="torch")
    assert set(seen) == {(torch.float32, "bf16"), (torch.bfloat16, before)}
    seen.clear()
    evaluate(npo, make_batch(torch.float16), NEEDS[:2], impl="torch")
    assert {precision for _, precision in seen} == {before} and SETTING.fp32_precision == before


@pytest.mark.parametrize("seed", range(12))
def test_a_native_call_allocates_what_its_plan_counts(native, plans, seed):
    from tests.test_workspace import peak_bytes, random_call, smallest_mb

    run = random_call(seed, torch.bfloat16)
    enough = smallest_mb(run)
    for given in (enough, None):
        plans.clear()
        measured = peak_bytes(lambda given=given: run(given))
        planned = max(plan.workspace_bytes for plan in plans)
        assert 0.35 * planned <= measured <= planned, (given, plans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=support.name_of)
def test_a_gradient_that_is_given_away_is_nobody_elses(dtype, monkeypatch):
    """Not multiplied by 1 in the last backward over the graph; a copy as long as another backward may follow."""
    multiplied = []
    scaled = gradients.scaled
    monkeypatch.setattr(gradients, "scaled", lambda *args, **kw: multiplied.append(args) or scaled(*args, **kw))
    batch = make_batch(dtype).leaves(("weight",))
    loss = npo(batch, impl="torch")
    loss.backward(retain_graph=True)
    once = batch.weight.grad.clone()
    assert multiplied and once.any()
    batch.weight.grad.zero_()  # would destroy the saved gradient if it were the same memory
    batch.weight.grad = None
    multiplied.clear()
    loss.backward()
    assert not multiplied and torch.equal(batch.weight.grad, once)
    npo(batch, impl="torch").backward()
    (2.0 * npo(batch, impl="torch")).backward()
    assert len(multiplied) == 1 and relative_error(batch.weight.grad, 4.0 * once.double()) < 2**-8


@pytest.mark.parametrize("function", [support.npo, support.user_loss], ids=lambda f: f.__name__)
def test_a_gradient_that_is_given_away_has_no_graph(function):
    """Micro-batches whose gradients are summed by hand keep no earlier ones alive; NumPy takes it."""
    batch = support.make_batch().leaves(("weight",))
    grads = [torch.autograd.grad(function(batch, impl="torch"), batch.weight)[0] for _ in range(2)]
    assert not any(grad.requires_grad for grad in grads) and (grads[0] + grads[1]).numpy().any()


def test_gradients_of_several_upstreams_at_once():
    batch = support.make_batch().leaves(("weight",))
    upstream = torch.tensor([1.0, 3.0])
    (many,) = torch.autograd.grad(support.npo(batch, impl="torch"), batch.weight, upstream, is_grads_batched=True)
    (one,) = torch.autograd.grad(support.npo(batch, impl="torch"), batch.weight)
    assert torch.equal(many, upstream[:, None, None] * one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_waits_for_no_thread_of_its_parent(monkeypatch):
    """A thread that computes a product during the fork does not exist in the child."""
    monkeypatch.setitem(cpu._kind_lock.inside, True, 1)
    child = os.fork()
    if not child:
        with cpu._kind_lock.hold(False):
            os._exit(0)
    for _ in range(100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits")
    assert status == 0
