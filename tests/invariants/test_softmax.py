"""What holds of any log-softmax: gradients that sum to nothing, and logits that may be shifted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npo_kernels import token_logprobs
from tests import support
from tests.invariants.batches import batches
from tests.support import IMPLS, TINY, evaluate, npo

EXAMPLES = settings(max_examples=8)
NO_SOFTCAP = ("plain", "bias", "scale")  # behind a softcap it is the capped logits whose gradients sum to nothing


@pytest.mark.parametrize("objective", [npo, support.tokens])
@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,), heads=NO_SOFTCAP))
@EXAMPLES
def test_the_gradients_of_the_logits_of_a_row_sum_to_nothing(impl, objective, batch):
    """dBias = sum_i dlogits_i, and dWeight = sum_i dlogits_i x_i: summed over the vocabulary both are zero."""
    assume(batch.num_scored > 0)
    batch = replace(batch, bias=batch.bias if batch.bias is not None else torch.zeros(batch.weight.shape[0]))
    largest = abs(batch.logit_scale) * 4  # of a row's weight, in both objectives
    for workspace_mb in (None, TINY):
        values = evaluate(objective, batch, ("weight", "bias"), impl=impl, workspace_mb=workspace_mb)
        assert values["weight"].abs().sum() > 0 and values["bias"].abs().sum() > 0
        assert values["bias"].double().sum().abs() <= 8e-7 * largest * batch.num_scored
        allowed = 8e-7 * largest * batch.hidden.abs().double().sum((0, 1))
        assert (values["weight"].double().sum(0).abs() <= allowed).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,), heads=("bias", "plain")), st.sampled_from([-20.0, 3.0, 50.0]))
@EXAMPLES
def test_a_constant_added_to_every_logit_changes_nothing(impl, batch, constant):
    bias = torch.zeros(batch.weight.shape[0]) if batch.bias is None else batch.bias
    tokens = replace(batch, bias=bias)(token_logprobs, impl=impl)
    shifted = replace(batch, bias=bias + constant)(token_logprobs, impl=impl)
    # a logit near 50 carries 4e-6 in float32
    torch.testing.assert_close(shifted, tokens, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches())
@EXAMPLES
def test_no_log_probability_is_positive_and_those_of_all_labels_make_one(impl, batch):
    """One position, scored on every label of the vocabulary in turn."""
    V = batch.weight.shape[0]
    assume(V <= 129)
    hidden = batch.weight[:1] * 2  # towards the first token: one row at both ends of the range
    every = replace(
        batch,
        hidden=hidden.expand(V, -1),
        labels=torch.arange(V),
        cu_seqlens=torch.tensor([0, V], dtype=torch.int32),
        shift=False,
        lengths=(V,),
    )
    tokens = every(token_logprobs, impl=impl)
    assert (tokens <= 0).all()
    assert tokens.double().exp().sum().item() == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,)), st.sampled_from([0.5, 3.0]))
@EXAMPLES
def test_the_logit_scale_is_a_factor_of_the_head(impl, batch, factor):
    scaled = replace(batch, logit_scale=batch.logit_scale * factor)
    bias = None if batch.bias is None else batch.bias * factor
    moved = replace(batch, weight=batch.weight * factor, bias=bias)
    torch.testing.assert_close(
        scaled(token_logprobs, impl=impl), moved(token_logprobs, impl=impl), rtol=2e-6, atol=1e-5
    )
