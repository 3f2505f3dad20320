"""The loss formulas against their papers' expressions in float64, and at the ends of their range."""

import math

import pytest
import torch

from npo_kernels.core import formulas
from npo_kernels.core.formulas import RatioLoss

BETAS = (0.01, 0.1, 1.0, 4.5)
RATIOS = torch.tensor([-700.0, -40.0, -3.0, -1e-3, 0.0, 1e-3, 2.0, 25.0, 600.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_is_the_negative_log_sigmoid_of_equation_3(beta):
    """-(2/beta) log sigmoid(-beta r), with r = log(pi / pi_ref)."""
    expected = [2 / beta * (max(beta * r, 0) + math.log1p(math.exp(-abs(beta * r)))) for r in RATIOS.tolist()]
    torch.testing.assert_close(formulas.ratio_loss(RATIOS, beta), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
def test_the_weight_is_the_derivative_of_the_loss(beta):
    ratio = RATIOS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(formulas.ratio_loss(ratio, beta).sum(), ratio)
    torch.testing.assert_close(formulas.ratio_weight(RATIOS, beta), grad)


@pytest.mark.parametrize("beta", BETAS)
def test_at_the_reference_the_loss_is_2_ln_2_over_beta_and_the_weight_one(beta):
    zero = torch.zeros(1)
    assert formulas.ratio_loss(zero, beta).item() == pytest.approx(2 / beta * math.log(2), rel=2**-23)
    assert formulas.ratio_weight(zero, beta).item() == 1.0


def test_a_far_ratio_is_neither_nan_nor_wrong():
    ratio = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])
    assert formulas.ratio_loss(ratio, 0.1).tolist() == [0, 0, pytest.approx(2e30), math.inf]
    assert formulas.ratio_weight(ratio, 0.1).tolist() == [0, 0, 2, 2]


def test_npo_subtracts_the_reference_and_simnpo_divides_by_the_length():
    logps, counts = torch.tensor([-6.0, -9.0, 0.0]), torch.tensor([2, 3, 0])
    offset = torch.tensor([-5.0, -10.0, 1.0])
    assert formulas.log_ratio(logps, counts, offset, False).tolist() == [-1, 1, -1]
    assert formulas.log_ratio(logps, counts, offset, True).tolist() == [2, 7, -1]


def test_gamma_is_inside_the_factor_beta():
    """SimNPO's code: -(2/beta) log sigmoid(beta (NLL/|y| - gamma)); the offset is -gamma."""
    beta, gamma, nll, length = 2.5, 0.4, 7.0, 5
    ratio = formulas.log_ratio(torch.tensor([-nll]), torch.tensor([length]), torch.tensor([-gamma]), True)
    expected = -2 / beta * math.log(1 / (1 + math.exp(-beta * (nll / length - gamma))))
    assert formulas.ratio_loss(ratio, beta).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("reduction", "normalizer", "expected"),
    [
        ("mean", None, [0.5, 0, 0.5]),
        ("mean", 8, [0.125, 0, 0.125]),
        ("mean", torch.tensor(4.0), [0.25, 0, 0.25]),
        ("sum", None, [1, 0, 1]),
        ("none", None, [1, 0, 1]),
    ],
)
def test_only_sequences_with_a_scored_token_count(reduction, normalizer, expected):
    assert formulas.sequence_scale(torch.tensor([3, 0, 1]), reduction, normalizer).tolist() == expected


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_scored_gives_scale_zero(reduction):
    assert formulas.sequence_scale(torch.tensor([0, 0]), reduction, None).tolist() == [0, 0]


def make_ratio_loss(length_normalized):
    counts = torch.tensor([3, 0, 7, 1])
    offset, scale = torch.tensor([-4.0, 0.3, -20.0, 1.0]).double(), torch.tensor([0.5, 0.0, 2.0, 0.25]).double()
    return RatioLoss(offset, scale, counts, 0.8, length_normalized), torch.tensor([-5.0, 0.0, -18.0, -0.2]).double()


@pytest.mark.parametrize("length_normalized", [False, True])
def test_the_gradient_is_that_of_the_scaled_sum(length_normalized):
    ratio, logps = make_ratio_loss(length_normalized)
    logps.requires_grad_()
    losses, grad = ratio.value_and_grad(logps)
    (expected,) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("length_normalized", [False, True])
def test_a_part_of_the_sequences_has_its_part_of_the_results(length_normalized):
    ratio, logps = make_ratio_loss(length_normalized)
    for whole, part in zip(ratio.value_and_grad(logps), ratio.sequences(1, 3).value_and_grad(logps[1:3]), strict=True):
        assert torch.equal(part, whole[1:3])
