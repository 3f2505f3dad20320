"""The tests' own tools: poison shows, batches have what they promise, and the error rule can fail."""

from functools import partial

import pytest
import torch

from npo_kernels import explain, fused_npo_loss
from npo_kernels.backends.choose import backend_of
from npo_kernels.core import softmax_stats
from npo_kernels.core.plan import GRAD_SLICE
from tests import support
from tests.support import DTYPES, HEADS, IMPLS, LAYOUTS, make_batch, name_of


def allocate_in(namespace):
    code = (
        "made = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2, 2), torch.empty(3).int()]"
    )
    exec(code, namespace)
    return namespace["made"]


def test_unwritten_memory_of_the_library_is_nan(poisoned_allocations):
    floats = allocate_in({"torch": torch, "__name__": softmax_stats.__name__})[:3]
    assert all(values.isnan().all() for values in floats)
    code = "made = torch.empty(3, dtype=torch.int64)"
    namespace = {"torch": torch, "__name__": "npo_kernels.core.layout"}
    exec(code, namespace)
    assert (namespace["made"] == 2**30).all()


def test_memory_of_others_is_left_alone(poisoned_allocations):
    assert not any(
        values.isnan().all() for values in allocate_in({"torch": torch, "__name__": "npo_kernels_of_others"})
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unwritten_result_is_noticed(poisoned_allocations, monkeypatch, impl):
    """The tests of a path fail if one of its outputs is allocated and then forgotten."""
    backend = backend_of(impl)
    monkeypatch.setattr(backend, "finish_hidden_grad", lambda *_: None)
    batch, needs = make_batch(), ("hidden",)
    plain, oracle = support.evaluate_plain_and_oracle(support.npo, batch, needs)
    with pytest.raises(AssertionError, match="hidden"):
        support.assert_no_worse_than_plain(support.evaluate(support.npo, batch, needs, impl=impl), plain, oracle)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", HEADS)
def test_batches_have_what_goes_wrong_elsewhere(head, layout):
    batch = make_batch(head=head, layout=layout)
    has_bias, logit_scale, softcap = HEADS[head]
    assert (batch.bias is not None, batch.logit_scale, batch.softcap) == (has_bias, logit_scale, softcap)
    assert 0 in batch.lengths and 1 in batch.lengths and len(set(batch.lengths)) > 2
    labels = batch.labels[batch.labels != -100]
    assert {0, batch.weight.shape[0] - 1} <= set(labels.tolist())
    assert len(labels.unique()) < len(labels)
    assert batch.num_scored % 16 != 0
    if layout == "packed":
        first = batch.cu_seqlens[:-1].long()[torch.tensor(batch.lengths) > 0]
        assert (batch.labels[first] != -100).any()  # the shift must not score the first label of a sequence


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_oracle_sees_the_rounded_numbers(dtype):
    batch = make_batch(dtype, "bias")
    exact = batch.leaves(dtype=torch.float64)
    for name, values in batch.tensors.items():
        assert torch.equal(exact.tensors[name].to(dtype), values) and exact.tensors[name].dtype == torch.float64


@pytest.mark.parametrize("V", [200, GRAD_SLICE + 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_workspace_for_chunks_holds_the_longest_sequence_and_not_all(impl, dtype, V):
    batch = make_batch(dtype, lengths=(20, 30, 9), prompts=(0, 0, 0), H=8, V=V)
    leaves = batch.leaves(("hidden", "weight"))
    for chunks in (True, False):
        workspace_mb = support.workspace_for(batch, impl, chunks)
        plan = leaves(partial(explain, fused_npo_loss), impl=impl, workspace_mb=workspace_mb)
        assert plan.mode == "slab" and (len(plan.chunks) > 1) == chunks, plan


def test_the_error_rule_fails_on_nan_on_a_wrong_dtype_and_on_more_than_plain():
    truth = {"x": torch.ones(4, dtype=torch.float64)}
    plain = {"x": torch.full((4,), 1 + 1e-3)}
    support.assert_no_worse_than_plain({"x": torch.full((4,), 1 + 1e-6)}, plain, truth)
    support.assert_no_worse_than_plain({"x": torch.full((4,), 1 + 9e-4)}, plain, truth, ceiling=False)
    for bad in (torch.full((4,), torch.nan), torch.full((4,), 1 + 2e-3), torch.ones(4).bfloat16(), torch.zeros(4)):
        with pytest.raises(AssertionError):
            support.assert_no_worse_than_plain({"x": bad}, plain, truth, ceiling=False)
