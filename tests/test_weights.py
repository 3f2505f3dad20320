"""`weights=`: a factor for each sequence of the papers' losses."""

import math

import pytest
import torch

from npo_kernels import fused_npo_loss, fused_simnpo_loss
from npo_kernels.core import value_checks
from tests.support import (
    IMPLS,
    LAYOUTS,
    TINY,
    assert_no_worse_than_plain,
    evaluate,
    evaluate_plain_and_oracle,
    make_batch,
    name_of,
    npo,
    relative_error,
    simnpo,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

SMALL = {"lengths": (6, 1, 4, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150}  # one sequence scores nothing
WEIGHTS = torch.tensor([0.25, math.nan, 3.0, 0.5])
ALL = ("hidden", "weight")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", [npo, simnpo], ids=["npo", "simnpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_they_are_factors_of_the_losses(impl, layout, objective, reduction):
    """And "mean" divides by the number of sequences, not by the sum of the weights."""
    batch = make_batch(layout=layout, **SMALL)
    upstream = torch.tensor([0.3, 1.0, -1.7, 0.9]) if reduction == "none" else torch.tensor(1.0)
    count = 3.0 if reduction == "mean" else 1.0

    def by_hand(b, **options):
        losses = objective(b, reduction="none", **options) * WEIGHTS.nan_to_num()
        return (losses * upstream).sum() / count

    def built_in(b, **options):
        return (objective(b, reduction=reduction, weights=WEIGHTS, **options) * upstream).sum()

    for workspace_mb in (None, TINY):
        expected = evaluate(by_hand, batch, ALL, impl=impl, workspace_mb=workspace_mb)
        for name, value in evaluate(built_in, batch, ALL, impl=impl, workspace_mb=workspace_mb).items():
            assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_no_worse_than_plain_pytorch(impl, dtype):
    def weighted(b, **options):
        return npo(b, weights=WEIGHTS, **options)

    batch = make_batch(dtype, **SMALL)
    plain, oracle = evaluate_plain_and_oracle(weighted, batch, ALL)
    assert_no_worse_than_plain(evaluate(weighted, batch, ALL, impl=impl), plain, oracle)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ones_change_no_bit_and_stats_stay_those_of_the_sequences(impl):
    batch = make_batch(**SMALL)
    options = {"ref_logps": batch.ref_logps, "impl": impl, "return_stats": True}
    loss, stats = batch(fused_npo_loss, **options)
    for weights in (torch.ones(4), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)):
        same, same_stats = batch(fused_npo_loss, weights=weights, **options)
        assert torch.equal(loss, same) and torch.equal(stats.weight, same_stats.weight)
    _, halved = batch(fused_npo_loss, weights=torch.full((4,), 0.5), **options)
    assert torch.equal(halved.weight, stats.weight) and torch.equal(halved.logps, stats.logps)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_sequence_of_weight_zero_gets_no_gradient(impl):
    batch = make_batch(**SMALL)
    grads = evaluate(lambda b, **o: npo(b, weights=torch.tensor([1.0, 1.0, 0.0, 1.0]), **o), batch, ALL, impl=impl)
    assert (grads["hidden"][2] == 0).all() and (grads["hidden"][3] != 0).any()
    without = batch.sequences([0, 1, 3])
    expected = evaluate(lambda b, **o: npo(b, normalizer=3, **o), without, ALL, impl=impl)
    assert relative_error(grads["weight"], expected["weight"]) < 1e-6


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_weight_of_zero_leaves_a_reference_out_but_not_a_wrong_label(impl, monkeypatch):
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    batch = make_batch(**SMALL)
    expected = evaluate(lambda b, **o: npo(b, weights=weights, **o), batch, ALL, impl=impl)
    batch.ref_logps[2] = math.nan
    for name, value in evaluate(lambda b, **o: npo(b, weights=weights, **o), batch, ALL, impl=impl).items():
        assert torch.equal(value, expected[name]), name
    batch.labels[2, 2] = 150
    monkeypatch.setattr(value_checks, "readable", lambda tensor: False)  # as on a GPU
    assert npo(batch, weights=weights, impl=impl).isnan()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_wrong_ones_are_named(impl, monkeypatch):
    batch = make_batch(**SMALL)
    for weights, message in (
        (torch.ones(3), r"weights: expected one per sequence, \(4,\), got \(3,\) float32"),
        (torch.tensor([1.0, 0.0, -0.5, 1.0]), "weights: expected finite factors >= 0, got -0.5 at sequence 2"),
        (torch.tensor([math.inf, 0.0, 0.5, 1.0]), "weights: expected finite factors >= 0, got inf at sequence 0"),
        (torch.ones(4, requires_grad=True), "weights: expected a constant, .*under torch.no_grad"),
    ):
        with pytest.raises(ValueError, match=message):
            npo(batch, weights=weights, impl=impl)
    with pytest.raises(TypeError, match="weights: expected a tensor of real numbers"):
        batch(fused_simnpo_loss, weights=torch.ones(4, dtype=torch.complex64), impl=impl)
    monkeypatch.setattr(value_checks, "readable", lambda tensor: False)  # as on a GPU
    assert npo(batch, weights=torch.tensor([1.0, 0.0, -0.5, 1.0]), impl=impl).isnan()
