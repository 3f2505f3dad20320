"""The paper's statements about the loss: its limits in beta (gradient ascent, zero), and its first value."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npo_kernels import fused_npo_loss, fused_simnpo_loss, sequence_logprobs
from npo_kernels.core import formulas
from tests.invariants.batches import batches
from tests.support import IMPLS, TINY, evaluate, make_batch, npo, relative_error

EXAMPLES = settings(max_examples=8)
BETAS = st.sampled_from([0.02, 0.1, 0.7, 3.0])
EVERY_WAY = [((), None), (("hidden",), TINY), (("hidden", "weight"), None), (("hidden", "weight"), TINY)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7.5, torch.float16: 2**-10.5}


def ascent(batch, **options):
    """Gradient ascent: the mean log-probability of the sequences that have one."""
    logps, counts = batch(sequence_logprobs, **options)
    return logps.sum() / max(1, int((counts > 0).sum()))


def gradients(objective, batch, impl, **options):
    values = evaluate(objective, batch, ("hidden", "weight"), impl=impl, **options)
    return values["hidden"], values["weight"]


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), BETAS)
@EXAMPLES
def test_with_the_policy_as_reference_the_loss_is_2_ln_2_over_beta(impl, batch, beta):
    """Exactly, on the kernels, in every mode, however the reference was cached: the log-ratio is 0, not nearly 0."""
    ref_logps, counts = batch.packed()(sequence_logprobs, impl=impl, workspace_mb=TINY)
    assume((counts > 0).any())
    start = formulas.ratio_loss(torch.zeros(()), beta)
    assert start.item() == pytest.approx(2 / beta * math.log(2), rel=2**-22)
    for needs, workspace_mb in EVERY_WAY:
        leaves = batch.leaves(needs)
        loss, stats = leaves(
            fused_npo_loss, ref_logps=ref_logps, beta=beta, impl=impl, workspace_mb=workspace_mb, return_stats=True
        )
        if impl == "triton":
            assert (stats.log_ratio == 0).all()
            assert (stats.weight == 1).all()
            assert loss.item() == pytest.approx(start.item(), rel=2e-7)
        else:
            assert stats.log_ratio.abs().max() < 1e-4
            assert loss.item() == pytest.approx(start.item(), abs=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), BETAS)
@EXAMPLES
def test_with_the_policy_as_reference_the_gradient_is_that_of_gradient_ascent(impl, batch, beta):
    ref_logps, _ = batch(sequence_logprobs, impl=impl)
    expected = gradients(ascent, batch, impl)
    for workspace_mb in (None, TINY):
        found = gradients(npo, replace(batch, ref_logps=ref_logps), impl, beta=beta, workspace_mb=workspace_mb)
        for got, truth in zip(found, expected, strict=True):
            assert relative_error(got, truth.double()) < 1e-5 + ROUNDING[got.dtype]


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(), st.sampled_from([1e-7, 1e-9, 1e-30]))
@EXAMPLES
def test_for_beta_to_zero_the_gradient_becomes_that_of_gradient_ascent(impl, batch, beta):
    expected = gradients(ascent, batch, impl)
    for got, truth in zip(gradients(npo, batch, impl, beta=beta), expected, strict=True):
        assert relative_error(got, truth.double()) < 1e-5 + ROUNDING[got.dtype]


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,)), st.sampled_from([200.0, 2e3, 1e30]))
@EXAMPLES
def test_a_fully_forgotten_sequence_gives_a_vanishing_gradient_and_leaves_the_others_alone(impl, batch, distance):
    logps, counts = batch(sequence_logprobs, impl="reference")
    forgotten = int(counts.argmax())
    assume(counts[forgotten] > 0)
    ref_logps = logps - 1.0
    ref_logps[forgotten] = logps[forgotten] + distance  # r = -distance, weight 2 sigmoid(-distance) <= 2e-87
    everyone = replace(batch, ref_logps=ref_logps)
    kept = torch.arange(len(counts)) != forgotten
    others = replace(everyone, labels=torch.where(kept[:, None], batch.labels, -100))
    for needs, workspace_mb in EVERY_WAY[1:]:
        run = {"impl": impl, "workspace_mb": workspace_mb, "beta": 1.0, "normalizer": 3}
        values, expected = evaluate(npo, everyone, needs, **run), evaluate(npo, others, needs, **run)
        assert (values["hidden"][forgotten].abs() < 1e-30).all()
        for name, value in values.items():
            # another number of rows: another order in the vendor's products
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,)), BETAS)
@EXAMPLES
def test_the_weight_of_a_sequence_is_its_share_of_gradient_ascent(impl, batch, beta):
    """Sequence by sequence: dHidden of NPO is 2 sigmoid(beta r) times that of gradient ascent, and never against it."""
    leaves = batch.leaves(("hidden",))
    loss, stats = leaves(
        fused_npo_loss, ref_logps=batch.ref_logps, beta=beta, impl=impl, reduction="sum", return_stats=True
    )
    (grad,) = torch.autograd.grad(loss, leaves.hidden)
    (expected,) = torch.autograd.grad(leaves(sequence_logprobs, impl=impl)[0].sum(), leaves.hidden)
    assert ((stats.weight >= 0) & (stats.weight <= 2)).all()
    assert relative_error(grad, (stats.weight[:, None, None] * expected).double()) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@given(batches(dtypes=(torch.float32,)), st.sampled_from([0.0, 1.5]), BETAS)
@EXAMPLES
def test_simnpo_is_npo_of_the_mean_token_against_a_fixed_reference(impl, batch, gamma, beta):
    """With every sequence of one length L, SimNPO(beta, gamma) is NPO with beta/L and ref = -gamma L, over L."""
    length = 6
    batch = make_batch(lengths=(length,) * 3, prompts=(0,) * 3, H=12, V=batch.weight.shape[0], seed=len(batch.lengths))
    L = length - 1
    needs = ("hidden", "weight")
    values = evaluate(lambda b, **o: b(fused_simnpo_loss, beta=beta, gamma=gamma, **o), batch, needs, impl=impl)
    same = replace(batch, ref_logps=torch.full((3,), -gamma * L))
    expected = evaluate(npo, same, needs, impl=impl, beta=beta / L)
    for name, value in values.items():
        assert relative_error(value * L, expected[name].double()) < 1e-5
