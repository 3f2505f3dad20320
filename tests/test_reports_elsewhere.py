"""What users of other fused losses reported, tried here: `docs/reports_elsewhere.md` has the threads.

Only what no other test covers; the table names those that others cover.
"""

import gc
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from npo_kernels import (
    fused_linear_kl,
    fused_npo_loss,
    fused_token_loss,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from tests import support
from tests.support import DEVICE, IMPLS, ON_GPU, make_batch, relative_error, upstream
from tests.test_execute import Allocations

each_impl = pytest.mark.parametrize("impl", IMPLS)
NEEDS = ("hidden", "weight")


def small(**options):
    return make_batch(**{"lengths": (7, 1, 5), "prompts": (2, 0, 0), "H": 8, "V": 50, **options})


def kl_of(batch, **options):
    """Against a reference of other hidden states and the same bias, without gradient."""
    hidden, weight, bias = (None if t is None else t.detach() for t in (batch.hidden, batch.weight, batch.bias))
    arguments = batch.hidden, batch.weight, 1.3 * hidden, 1.1 * weight
    return fused_linear_kl(*arguments, mask=batch.labels != -100, bias=batch.bias, ref_bias=bias, **options)


def kl(batch, **options):
    return kl_of(batch, **options)


def reverse_kl(batch, **options):
    return kl_of(batch, direction="reverse", **options)


def token_loss(batch, **options):
    return batch(fused_token_loss, lambda logps, sequence, counts: (logps.exp() * logps).sum(), **options)


# name -> batch -> a vector, with a backward for any upstream gradient
VECTORS = {
    "NPO, none": lambda batch, **options: support.npo(batch, reduction="none", **options),
    "sequences": lambda batch, **options: batch(sequence_logprobs, **options)[0],
    "tokens": lambda batch, **options: batch(token_logprobs, **options),
    "entropy": lambda batch, **options: batch(token_statistics, ["entropy"], **options)["entropy"],
    "KL, none": lambda batch, **options: kl_of(batch, reduction="none", **options),
}
# name -> batch -> a scalar
SCALARS = {
    "NPO": support.npo,
    "SimNPO": support.simnpo,
    "user loss": support.user_loss,
    "token loss": token_loss,
    "KL": kl,
    "reverse KL": reverse_kl,
    **{name: lambda batch, f=f, **options: f(batch, **options).sum() for name, f in VECTORS.items()},
}
each = pytest.mark.parametrize("name", SCALARS)
# The interpreter is slow: what depends on a backend's loops has both, and some of the losses stand for the others.
FEW = ("NPO", "tokens", "entropy", "KL")
each_on_both = pytest.mark.parametrize(
    ("impl", "name"), [*(("torch", name) for name in SCALARS), *(("triton", name) for name in FEW)]
)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("impl", "name"), [*(("torch", name) for name in VECTORS), ("triton", "tokens")])
def test_an_upstream_gradient_of_any_strides(impl, name):
    """sum() sends one number expanded to all, with a stride of 0, and slicing sends every other entry of a tensor."""
    batch = small().leaves(NEEDS)
    values = VECTORS[name](batch, impl=impl)
    leaves = batch.hidden, batch.weight
    g = upstream(values.shape).float()
    spread = torch.stack((g, torch.full_like(g, torch.nan)), -1)[..., 0]
    expanded = torch.tensor(-0.7, device=DEVICE).expand(values.shape)
    for strided in (spread, expanded):
        dense = strided.contiguous() if strided is spread else strided.clone(memory_format=torch.contiguous_format)
        ours = torch.autograd.grad(values, leaves, strided, retain_graph=True)
        for a, b in zip(ours, torch.autograd.grad(values, leaves, dense, retain_graph=True), strict=True):
            assert torch.equal(a, b) and a.any()


@each_on_both
def test_what_came_in_is_left_as_it_was(impl, name):
    """The hidden states are the saved result of a softmax: a loss that writes its gradient there spoils that of others.
    Kernels that write do not raise the version of a tensor, so autograd would not notice.
    """

    def gradients(impl):
        leaves = small().leaves(NEEDS)
        batch = replace(leaves, hidden=leaves.hidden.softmax(-1) * 3, weight=leaves.weight.tanh())
        tensors = batch.hidden, batch.weight, batch.labels, batch.ref_logps
        before = [t.detach().clone() for t in tensors]
        loss = SCALARS[name](batch, impl=impl)
        grads = torch.autograd.grad(loss, (leaves.hidden, leaves.weight), torch.full_like(loss, 0.7))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
        return grads

    for a, b in zip(gradients(impl), gradients("reference"), strict=True):
        assert relative_error(a, b) < 5e-6


@each_on_both
def test_a_mask_that_leaves_the_end_of_one_sequence(impl, name):
    """Only the last answer is scored, as chat data has it: its gradient is that of the oracle, and not zero."""
    batch = small(lengths=(9, 9), prompts=(9, 7))
    plain, oracle = support.evaluate_plain_and_oracle(SCALARS[name], batch, NEEDS)
    ours = support.evaluate(SCALARS[name], batch, NEEDS, impl=impl)
    for key, truth in oracle.items():
        assert truth.any() and relative_error(ours[key], truth) <= 2 * relative_error(plain[key], truth) + 1e-6, key


@each
def test_the_backward_does_not_ask_for_autocast(name):
    """It runs where the caller of backward() is: inside an autocast of the forward, outside, inside another one."""
    batch = small().leaves(NEEDS)
    found = []
    for dtype in (None, torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = SCALARS[name](batch, impl="torch")
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            found.append(torch.autograd.grad(loss, (batch.hidden, batch.weight), torch.full_like(loss, 0.7)))
    for other in found[1:]:
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(ON_GPU, reason="it is about allocations on the host")
@each_impl
def test_a_frozen_head_gets_no_gradient_of_its_size(impl):
    def largest(needs):
        batch = small(V=400, H=16).leaves(needs)
        with Allocations() as made:
            support.user_loss(batch, impl=impl).backward()
        made.sizes.pop(batch.weight.untyped_storage().data_ptr())  # views of it
        return max(made.sizes.values()) / (batch.weight.numel() * 4)

    assert largest(("hidden",)) < 1 <= largest(NEEDS)


@pytest.mark.skipif(ON_GPU, reason="one device is enough for counting references")
@each
def test_nothing_is_kept_after_the_backward(name):
    """Not by the loss that is kept for the log, and not in a reference cycle that waits for the collector."""

    def step():
        batch = small().leaves(NEEDS)
        batch = replace(batch, hidden=batch.hidden * 1.0, weight=batch.weight * 1.0)
        loss = SCALARS[name](batch, impl="torch")
        loss.backward()
        return loss, weakref.ref(batch.hidden), weakref.ref(batch.weight)

    step()  # what the first call leaves in caches
    gc.collect()
    gc.disable()
    try:
        loss, *kept = step()
        assert loss.isfinite() and [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "softcap"), [(-200.0, None), (-200.0, 1.0), (-200.0, 30.0), (1e8, None), (-1e8, None)]
)
@each_impl
def test_equal_logits_of_any_size_are_a_uniform_distribution(impl, offset, softcap, small_blocks):
    """Columns that fill up a tile would count as exp(0) beside logits of -200, or as exp(-softcap) behind a softcap.
    And log sum exp - z_y is 0, instead of log V, where both are rounded at 1e8.
    """
    V = 70  # no multiple of any tile
    batch = replace(small(lengths=(4,), prompts=(0,), V=V), bias=torch.full((V,), offset), softcap=softcap)
    batch = replace(batch, hidden=torch.zeros_like(batch.hidden)).leaves(NEEDS)
    logps = batch(sequence_logprobs, impl=impl)[0]
    assert logps.item() == pytest.approx(-3 * math.log(V), rel=3e-7)
    entropy = batch(token_statistics, ["entropy"], impl=impl)["entropy"][0, 0]
    assert entropy.item() == pytest.approx(math.log(V), rel=3e-7)
    loss = fused_linear_kl(
        *(batch.hidden, batch.weight, batch.hidden, batch.weight.detach().flip(0)),
        bias=batch.bias, ref_bias=batch.bias - 3, softcap=softcap, impl=impl,
    )  # fmt: skip
    assert abs(loss.item()) < 1e-6


RULED_OUT = {"the end": slice(30, 200), "the beginning": slice(0, 150), "the middle": slice(70, 150)}
each_ruled_out = pytest.mark.parametrize(
    ("impl", "where"), [*(("torch", where) for where in RULED_OUT), ("triton", "the beginning")]
)
each_mode = pytest.mark.parametrize(
    ("needs", "workspace_mb"),
    [(NEEDS, None), (NEEDS, support.TINY), (("hidden",), support.TINY)],
    ids=["slab", "recompute", "frozen"],
)


@each_mode
@each_ruled_out
def test_tokens_that_a_bias_rules_out_are_as_if_they_were_not_there(impl, needs, workspace_mb, where, small_blocks):
    """Padding of a vocabulary, masked by -inf: 0 log 0 is 0, and exp(-inf - -inf) is never formed, in whole tiles."""
    gone = torch.zeros(200, dtype=torch.bool)
    gone[RULED_OUT[where]] = True
    here = (~gone).nonzero().squeeze(1).to(DEVICE)
    full = small(V=200)
    labels = torch.where(full.labels == -100, -100, here[full.labels.clamp(min=0) % len(here)])
    full = replace(full, labels=labels, bias=torch.where(gone.to(DEVICE), -torch.inf, 0.0))
    place = torch.where(labels == -100, -100, torch.searchsorted(here, labels.clamp(min=0)))
    cut = replace(full, weight=full.weight[here], bias=None, labels=place)
    for name in ("NPO", "tokens", "entropy", "KL", "reverse KL"):
        oracle = support.evaluate(SCALARS[name], cut, needs, impl="reference", dtype=torch.float64)
        for one in (impl, "reference") if impl == "torch" else (impl,):
            ours = support.evaluate(SCALARS[name], full, needs, impl=one, workspace_mb=workspace_mb)
            if "weight" in needs:
                assert not ours["weight"][gone].any(), name
                ours["weight"] = ours["weight"][here]
            for key, truth in oracle.items():
                assert relative_error(ours[key], truth) < 5e-6, (name, one, key)


@each_mode
@each_ruled_out
def test_a_label_that_is_ruled_out_has_probability_zero(impl, needs, workspace_mb, where, small_blocks):
    """Not NaN: to NPO its sequence is forgotten, loss and gradient 0, and the others have what they had."""
    bias = torch.zeros(200, device=DEVICE)
    bias[RULED_OUT[where]] = -torch.inf
    batch = small(V=200)
    label = RULED_OUT[where].start
    labels = torch.where(batch.labels == -100, -100, 29 if label else 199)
    labels[0, 5] = label
    batch = replace(batch, labels=labels, bias=bias)
    assert batch(token_logprobs, impl=impl)[0, 4] == -torch.inf
    plain, oracle = support.evaluate_plain_and_oracle(support.npo, batch, needs)
    ours = support.evaluate(support.npo, batch, needs, impl=impl, workspace_mb=workspace_mb)
    support.assert_no_worse_than_plain(ours, plain, oracle, slack=2.0)
    assert ours["hidden"][2].any() and not ours["hidden"][0].any()


# ---------------------------------------------------------------------------------------------------------------------
# What a process has set
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@each_on_both
def test_the_default_dtype_of_a_process_changes_no_bit(impl, name):
    batch = small()
    expected = support.evaluate(SCALARS[name], batch, NEEDS, impl=impl)
    for dtype in (torch.bfloat16, torch.float64) if impl == "torch" else (torch.bfloat16,):
        with default_dtype(dtype):
            found = support.evaluate(SCALARS[name], batch, NEEDS, impl=impl)
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), (dtype, key)


@each
def test_constants_may_come_out_of_inference_mode(name):
    """Labels, cached reference log-probabilities and a teacher's hidden states: autograd saves none of those."""
    expected = support.evaluate(SCALARS[name], small(), NEEDS, impl="torch")
    with torch.inference_mode():
        constants = small()
        teacher = 1.3 * constants.hidden, 1.1 * constants.weight
    batch = replace(small().leaves(NEEDS), labels=constants.labels, ref_logps=constants.ref_logps)
    assert batch.labels.is_inference() and teacher[0].is_inference()
    if "KL" in name:
        options = {"direction": "reverse" if name == "reverse KL" else "forward"}
        options["reduction"] = "none" if "none" in name else "mean"
        mask = batch.labels != -100
        loss = fused_linear_kl(batch.hidden, batch.weight, *teacher, mask=mask, impl="torch", **options).sum()
    else:
        loss = SCALARS[name](batch, impl="torch")
    loss.backward()
    for value, key in ((loss, "loss"), (batch.hidden.grad, "hidden"), (batch.weight.grad, "weight")):
        assert torch.equal(value, expected[key]), key


def test_more_than_65536_tokens():
    """Kernels that take a row at a time end at a block of 2^16."""
    V = 2**16 + 5
    batch = small(lengths=(4,), prompts=(0,), V=V, H=2)
    batch = replace(batch, labels=torch.tensor([[0, V - 1, 2**16, 3]], device=DEVICE))
    plain, oracle = support.evaluate_plain_and_oracle(support.npo, batch, NEEDS)
    ours = support.evaluate(support.npo, batch, NEEDS, impl="torch")
    support.assert_no_worse_than_plain(ours, plain, oracle, slack=2.0, ceiling=False)


@each_impl
def test_a_count_of_any_dtype_divides(impl):
    """num_items_in_batch comes as a Python number or as an integer tensor."""
    batch = small()
    counts = 3, torch.tensor(3), torch.tensor(3, dtype=torch.int32), torch.tensor(3.0, dtype=torch.float64)
    losses = [batch(fused_npo_loss, ref_logps=batch.ref_logps, normalizer=count, impl=impl) for count in counts]
    assert all(torch.equal(loss, losses[0]) for loss in losses)
