"""The device functions against float64, over the range in which they are used and at its ends."""

import pytest
import torch
import triton
import triton.language as tl

from csrc_triton import common
from tests.support import DEVICE

SIZE = 4096


@triton.jit
def _log1p(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, common.log1p(tl.load(x_ptr + at)))


@triton.jit
def _softplus(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, common.softplus(tl.load(x_ptr + at)))


@triton.jit
def _sigmoid(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, common.sigmoid(tl.load(x_ptr + at)))


@triton.jit
def _tanh(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, common.tanh(tl.load(x_ptr + at)))


def powers(low, high):
    return torch.logspace(low, high, SIZE, dtype=torch.float64)


def both_signs(low, high):
    return torch.cat((-powers(low, high)[::2], powers(low, high)[1::2]))


def exact_softplus(x):
    return torch.where(x > 30, x + torch.exp(-x), torch.log1p(torch.exp(x)))


CASES = {
    "log1p": (_log1p, powers(-37, 37), torch.log1p),
    "softplus": (_softplus, both_signs(-3, 1.9), exact_softplus),
    "sigmoid": (_sigmoid, both_signs(-3, 1.9), torch.sigmoid),
    "tanh": (_tanh, both_signs(-8, 3), torch.tanh),
}


def apply(kernel, x):
    out = torch.full((SIZE,), torch.nan, device=DEVICE)
    kernel[(1,)](x.to(DEVICE), out, SIZE=SIZE)
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_within_some_units_of_the_last_place(name):
    kernel, x, exact = CASES[name]
    x = x.float()
    truth = exact(x.double()).to(DEVICE)
    error = (apply(kernel, x).double() / truth - 1).abs()
    # an argument of size a carries 2^-24 a into exp(a): 80 units at most here
    slack = 1 + (x.abs().double().to(DEVICE) / 4 if name in ("softplus", "sigmoid") else 0)
    assert (error <= 4 * 2**-23 * slack).all(), x[error.argmax().cpu()]


def test_limits_are_finite_and_right():
    ends = torch.tensor([-torch.inf, -1e30, -200.0, 0.0, 200.0, 1e30, torch.inf]).repeat(SIZE // 7 + 1)[:SIZE]
    assert apply(_sigmoid, ends)[:7].tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    assert apply(_tanh, ends)[:7].tolist() == [-1, -1, -1, 0, 1, 1, 1]
    softplus = apply(_softplus, ends)[:7]
    assert softplus[:3].tolist() == [0, 0, 0] and softplus[4:].tolist() == ends[4:7].tolist()
    assert abs(softplus[3].item() - 0.6931471805599453) < 1e-7
    assert apply(_log1p, torch.zeros(SIZE)).abs().max() == 0


def test_nan_stays_nan():
    for kernel in (_log1p, _softplus, _sigmoid, _tanh):
        assert apply(kernel, torch.full((SIZE,), torch.nan)).isnan().all()
