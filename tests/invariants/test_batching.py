"""A sequence's results are its own: not those of its batch, its place in it, its padding, or the workspace."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_kernels import fused_npo_loss, sequence_logprobs
from tests import support
from tests.invariants.batches import batches
from tests.support import IMPLS, TINY, evaluate, npo, relative_error

NEEDS = ("hidden", "weight")
EXAMPLES = settings(max_examples=8)
# Of gradients of one batch cut in two ways: sums in another order, and one rounding to the dtype of the inputs each.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7.5, torch.float16: 2**-10.5}


def logps_of(batch, impl, needs=(), workspace_mb=None):
    """Through the fused loss, so that the modes of `needs` and of the workspace are those of training."""
    leaves = batch.leaves(needs)
    _, stats = leaves(
        fused_npo_loss, ref_logps=batch.ref_logps, impl=impl, workspace_mb=workspace_mb, return_stats=True
    )
    return stats.logps


def assert_same_logps(got, expected, impl):
    """The same bits on the kernels; the torch path multiplies with a vendor's product, whose order is its own."""
    if impl == "triton":
        assert torch.equal(got, expected), (got - expected).abs().max()
    else:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def assert_same_gradients(got, expected, dtype):
    """`expected` in float32 or in `dtype`; small entries are compared with the size of the whole."""
    assert relative_error(got, expected.double()) < ROUNDING[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@given(batches())
@EXAMPLES
def test_packed_equals_padded(impl, batch):
    packed = batch.packed()
    assert_same_logps(logps_of(packed, impl), logps_of(batch, impl), impl)
    padded_values = evaluate(npo, batch, NEEDS, impl=impl)
    values = evaluate(npo, packed, NEEDS, impl=impl)
    torch.testing.assert_close(values["loss"], padded_values["loss"], rtol=1e-6, atol=1e-6)
    assert_same_gradients(values["weight"], padded_values["weight"], batch.hidden.dtype)
    if batch.labels.shape[1]:
        assert_same_gradients(packed.unpacked(values["hidden"]), padded_values["hidden"], batch.hidden.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), st.randoms(use_true_random=False))
@EXAMPLES
def test_permuting_sequences_permutes_results(impl, batch, random):
    order = list(range(len(batch.lengths)))
    random.shuffle(order)
    shuffled = batch.sequences(order)
    for layout in ("padded", "packed"):
        one, other = (batch, shuffled) if layout == "padded" else (batch.packed(), shuffled.packed())
        assert_same_logps(logps_of(other, impl), logps_of(one, impl)[order], impl)
    values, expected = (evaluate(npo, b, NEEDS, impl=impl) for b in (shuffled, batch))
    assert_same_gradients(values["hidden"], expected["hidden"][order], batch.hidden.dtype)
    assert_same_gradients(values["weight"], expected["weight"], batch.hidden.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(max_sequences=3), st.sampled_from([(), ("hidden",), NEEDS]))
@EXAMPLES
def test_a_sequence_has_the_same_log_probability_alone_and_in_company(impl, batch, needs):
    alone = torch.cat([logps_of(batch.sequences([s]), impl, needs) for s in range(len(batch.lengths))])
    assert_same_logps(alone, logps_of(batch, impl, needs), impl)
    assert_same_logps(alone, logps_of(batch.packed(), impl, needs), impl)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), st.sampled_from([TINY, 1.0, "chunks"]))
@settings(max_examples=12)
def test_any_workspace_gives_the_same_logps_and_the_same_gradients_within_rounding(impl, batch, workspace_mb):
    expected, gradients = logps_of(batch, impl), evaluate(npo, batch, NEEDS, impl=impl)
    for needs in ((), ("hidden",), NEEDS):
        leaves = batch.leaves(needs)
        if workspace_mb == "chunks":
            given = support.workspace_for(batch, impl, chunks=True) if needs == NEEDS else TINY
        else:
            given = workspace_mb
        loss, stats = leaves(
            fused_npo_loss, ref_logps=batch.ref_logps, impl=impl, workspace_mb=given, return_stats=True
        )
        assert_same_logps(stats.logps, expected, impl)
        grads = torch.autograd.grad(loss, [leaves.tensors[name] for name in needs]) if needs else ()
        for name, grad in zip(needs, grads, strict=True):
            assert_same_gradients(grad, gradients[name], grad.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), st.integers(0, 40), st.sampled_from([("hidden",), NEEDS]))
@EXAMPLES
def test_rows_that_only_fill_up_change_nothing(impl, batch, extra, needs):
    batch = batch.packed() if extra % 2 else batch
    if batch.labels.numel() == 0:
        return  # see test_losses.test_empty_shapes_are_batches_like_others
    num_rows = batch.num_scored + extra
    expected = evaluate(npo, batch, needs, impl=impl)
    for name, value in evaluate(npo, batch, needs, impl=impl, num_rows=num_rows).items():
        assert_same_gradients(value, expected[name], batch.tensors.get(name, value).dtype)
    _, stats = batch(fused_npo_loss, ref_logps=batch.ref_logps, impl=impl, num_rows=num_rows, return_stats=True)
    assert_same_logps(stats.logps, logps_of(batch, impl), impl)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,)), st.integers(1, 3))
@EXAMPLES
def test_micro_batches_with_the_count_of_the_whole_add_up_to_it(impl, batch, size):
    """`normalizer` is what gradient accumulation and data parallelism need."""
    _, counts = batch(sequence_logprobs, impl="reference")
    normalizer = max(1, int((counts > 0).sum()))
    expected = evaluate(npo, batch, NEEDS, impl=impl)
    loss, hidden, weight = 0.0, [], 0.0
    for first in range(0, len(batch.lengths), size):
        part = batch.sequences(range(first, min(first + size, len(batch.lengths))))
        values = evaluate(npo, part, NEEDS, impl=impl, normalizer=normalizer)
        loss, weight = loss + values["loss"], weight + values["weight"]
        hidden.append(values["hidden"])
    torch.testing.assert_close(loss, expected["loss"], rtol=2e-6, atol=1e-6)
    assert relative_error(weight, expected["weight"].double()) < 2e-6
    assert relative_error(torch.cat(hidden), expected["hidden"].double()) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@given(batches())
@EXAMPLES
def test_the_gradient_of_a_position_that_scores_nothing_is_exactly_zero(impl, batch):
    grad = evaluate(npo, batch, ("hidden",), impl=impl)["hidden"]
    targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, min(1, batch.labels.shape[1])), value=-100)
    assert (grad[targets == -100] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,), heads=("plain", "bias", "softcap")), st.randoms(use_true_random=False))
@EXAMPLES
def test_renaming_the_tokens_renames_the_rows_of_the_weight_gradient(impl, batch, random):
    """Labels fall into other tiles, other splits and other runs of equal ones."""
    V = batch.weight.shape[0]
    old = list(range(V))
    random.shuffle(old)
    old = torch.tensor(old)  # new token v is old[v]
    new = torch.empty_like(old).scatter(0, old, torch.arange(V))
    renamed = replace(
        batch,
        weight=batch.weight[old],
        bias=None if batch.bias is None else batch.bias[old],
        labels=torch.where(batch.labels >= 0, new[batch.labels.clamp(min=0)], batch.labels),
    )
    values, expected = evaluate(npo, renamed, NEEDS, impl=impl), evaluate(npo, batch, NEEDS, impl=impl)
    torch.testing.assert_close(values["loss"], expected["loss"], rtol=2e-6, atol=1e-6)
    assert relative_error(values["weight"], expected["weight"][old].double()) < 3e-6
    assert relative_error(values["hidden"], expected["hidden"].double()) < 3e-6
