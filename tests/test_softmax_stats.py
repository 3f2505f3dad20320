"""The arithmetic on row vectors that both backends share."""

import pytest
import torch

from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Statistics, anchor_headroom, gradient_coefficients
from tests.support import DTYPES, name_of


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_headroom_of_a_dtype_leaves_room_for_a_sum_over_a_vocabulary(dtype):
    largest = torch.tensor(anchor_headroom(dtype), dtype=torch.float64).exp()
    assert largest < torch.finfo(dtype).max / 15
    assert largest * 262144 < torch.finfo(torch.float32).max


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("logit_scale", [1.0, -0.4])
def test_coefficients_reassemble_the_gradient_of_the_log_probability(logit_scale, softcap):
    """d logp / d raw logits by autograd, against E and the two coefficients, at an anchor above the target."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(4, 9, generator=generator, dtype=torch.float64).requires_grad_()
    target, grad = torch.tensor([0, 3, 8, 8]), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    z = logit_scale * raw
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    (expected,) = torch.autograd.grad((grad * logp).sum(), raw)

    z, logp = z.detach(), logp.detach()
    z_target = z.gather(1, target[:, None]).squeeze(1)
    anchor = z_target + torch.tensor([0.0, 1.0, 5.0, torch.inf], dtype=torch.float64)  # a row of weight 0 may overflow
    stats = Statistics(z_target, logp, -torch.expm1(logp), anchor, torch.exp(anchor - z_target + logp))
    row_coef, target_coef = gradient_coefficients(stats, grad, Head(torch.zeros(9, 1), None, logit_scale, softcap))
    e = torch.exp(z - anchor[:, None])
    if softcap is not None:
        e = e * (1 - (z / softcap) ** 2)
    found = (-row_coef[:, None] * e).scatter(1, target[:, None], target_coef[:, None])
    torch.testing.assert_close(found, expected)
    assert row_coef[3] == 0 and target_coef[3] == 0
