"""workspace_mb is a bound, and a call allocates what its plan counts (traced on the CPU)."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from npo_kernels import (
    explain,
    fused_linear_kl,
    fused_npo_loss,
    fused_token_loss,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from npo_kernels.core.plan import MIB
from npo_kernels.core.row_moments import NAMES
from tests import support
from tests.support import make_batch

REVERSE = {"direction": "reverse", "target_shift": 2.0}
FUNCTIONS = {
    "npo": lambda x, w, y, **o: fused_npo_loss(x, w, y, ref_logps=x.new_zeros(len(y), dtype=torch.float32), **o),
    "user's": lambda x, w, y, **o: fused_token_loss(x, w, y, lambda tokens, *_: tokens.square().sum(), **o),
    "tokens": lambda x, w, y, **o: token_logprobs(x, w, y, **o).sum(),
    "statistics": lambda x, w, y, **o: sum(v.sum() for v in token_statistics(x, w, y, NAMES, **o).values()),
    "kl": lambda x, w, y, **o: fused_linear_kl(x, w, x.detach() + 1, w.detach(), mask=y != -100, **o),
    "kl by position": lambda x, w, y, **o: fused_linear_kl(
        x, w, x.detach() + 1, w.detach(), mask=y != -100, reduction="none", **REVERSE, labels=y, **o
    ).sum(),
}


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak of the memory that is freed before the end; results are not counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events, pending = [], profiler.profiler.kineto_results.experimental_event_tree()[::-1]
    while pending:  # in order: events of one nanosecond stay as they came
        event = pending.pop()
        pending += event.children[::-1]
        tag, fields = event.typed
        if tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    events.sort(key=lambda event: event[0])
    alive: dict[int, int] = {}
    earlier = set()  # frees of earlier allocations
    for number, (_, address, size) in enumerate(events):
        if size > 0:
            alive[address] = number
        elif alive.pop(address, None) is None:
            earlier.add(number)
    results, now, peak, total, most = set(alive.values()), 0, 0, 0, 0
    for number, (_, _, size) in enumerate(events):
        size = 0 if number in earlier else size
        now += 0 if number in results else size
        total += size
        peak, most = max(peak, now), max(most, total)
    del kept
    # an address may be taken for a result's where two events have one time: never less than without all results
    return max(peak, most - total)


def random_call(seed: int, *dtypes: torch.dtype) -> Callable[[float | None], object]:
    """A call with some workspace_mb, forward and backward; in any dtype, if none is given."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    dtype, name = pick(*(dtypes or support.DTYPES)), pick(*FUNCTIONS)
    B, S, H, V = pick(1, 2, 3, 5), pick(5, 40, 150, 300), pick(16, 64, 250, 600), pick(5000, 9000, 20_000)
    hidden, weight, bias = draw(B, S, H).to(dtype), (draw(V, H) / H**0.5).to(dtype), draw(V).to(dtype)
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < pick(0, 0.4)] = -100
    labels[0, 1] = 3  # something is scored
    needs = pick((True, True, True), (True, True, False), (True, False, False), (False, True, False), (False,) * 3)
    options = {"bias": bias if needs[2] or pick(True, False) else None, "softcap": pick(None, None, 20.0)}
    for t, need in zip((hidden, weight, bias), needs, strict=True):
        t.requires_grad_(need)
    wanted = [t for t in (hidden, weight, options["bias"]) if t is not None and t.requires_grad]

    def run(workspace_mb: float | None):
        loss = FUNCTIONS[name](hidden, weight, labels, impl="torch", workspace_mb=workspace_mb, **options)
        return torch.autograd.grad(-0.7 * loss, wanted) if wanted else loss

    return run


def smallest_mb(run: Callable[[float | None], object]) -> float:
    """What the refusal of a workspace says."""
    with pytest.raises(ValueError, match=r"workspace_mb: .* MiB is too small for this call") as refused:
        run(2e-6)
    return float(re.search(r"works is ([\d.]+)\. ", str(refused.value))[1])


@pytest.mark.parametrize("seed", range(60))
def test_a_call_allocates_what_its_plan_counts_and_no_more(seed, plans):
    """With the least that is enough, with more, and without a bound."""
    run = random_call(seed)
    workspace_mb = smallest_mb(run)
    for given in (workspace_mb, 1.7 * workspace_mb) if seed % 3 else (None,):
        plans.clear()
        measured = peak_bytes(partial(run, given))
        planned = max(plan.workspace_bytes for plan in plans)
        assert measured <= planned, (given, plans)
        assert measured >= 0.4 * planned, (given, plans)
        assert given is None or planned <= given * MIB


@pytest.mark.parametrize("impl", support.IMPLS)
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=support.name_of)
@pytest.mark.parametrize("function", [support.npo, support.user_loss, support.tokens], ids=lambda f: f.__name__)
def test_the_smallest_workspace_works_and_less_is_refused(impl, needs, function):
    batch = make_batch(torch.bfloat16).leaves(needs)
    enough = smallest_mb(lambda workspace_mb: function(batch, impl=impl, workspace_mb=workspace_mb))
    function(batch, impl=impl, workspace_mb=enough)
    with pytest.raises(ValueError, match="the smallest that works is"):
        function(batch, impl=impl, workspace_mb=0.9 * enough)


def test_explain_refuses_what_the_call_would():
    batch = make_batch().leaves(("hidden", "weight"))
    arguments = batch.hidden, batch.weight, batch.labels
    enough = smallest_mb(lambda mb: explain(sequence_logprobs, *arguments, impl="torch", workspace_mb=mb))
    plan = explain(sequence_logprobs, *arguments, impl="torch", workspace_mb=enough)
    assert plan.workspace_bytes <= enough * MIB


def test_without_a_bound_a_call_takes_what_it_needs(monkeypatch):
    """The default is a budget: a call that cannot keep it is not refused."""
    monkeypatch.setitem(support.plan.DEFAULT_WORKSPACE_MB, "cpu", 1e-5)
    batch = make_batch().leaves(("hidden", "weight"))
    plan = explain(fused_npo_loss, batch.hidden, batch.weight, batch.labels, impl="torch")
    assert plan.workspace_bytes > 1e-5 * MIB
    support.npo(batch, impl="torch").backward()
