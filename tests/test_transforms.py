"""Derivatives of other kinds than a backward: right, or an error that says which kind and what to use instead."""

import pytest
import torch

from npo_kernels import fused_linear_kl, fused_npo_loss, fused_token_loss, sequence_logprobs, token_logprobs
from tests.support import IMPLS

B, S, H, V = 2, 4, 6, 15
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(B, S, H, generator=GENERATOR)
WEIGHT = torch.randn(V, H, generator=GENERATOR)
REF_HIDDEN = HIDDEN + 0.1 * torch.randn(B, S, H, generator=GENERATOR)
LABELS = torch.randint(0, V, (B, S), generator=GENERATOR)
REF_LOGPS = torch.tensor([-20.0, -9.0])

# (hidden, weight, impl=) -> scalar
FUNCTIONS = {
    "npo": lambda x, w, **o: fused_npo_loss(x, w, LABELS, ref_logps=REF_LOGPS, **o),
    "npo, by sequence": lambda x, w, **o: fused_npo_loss(
        x, w, LABELS, ref_logps=REF_LOGPS, reduction="none", **o
    ).sum(),
    "any loss": lambda x, w, **o: fused_token_loss(x, w, LABELS, lambda tokens, *_: tokens.square().sum(), **o),
    "sequences": lambda x, w, **o: sequence_logprobs(x, w, LABELS, **o)[0].sum(),
    "tokens": lambda x, w, **o: token_logprobs(x, w, LABELS, **o).sum(),
    "kl": lambda x, w, **o: fused_linear_kl(x, w, REF_HIDDEN, WEIGHT, **o),
    "kl, by position": lambda x, w, **o: fused_linear_kl(x, w, REF_HIDDEN, WEIGHT, reduction="none", **o).sum(),
}
each = pytest.mark.parametrize("name", FUNCTIONS)
each_impl = pytest.mark.parametrize("impl", IMPLS)
FORWARD = "hidden: forward-mode derivatives .* the tangent would be lost: use torch.autograd.grad"
FUNCTIONAL = "hidden: the derivatives of torch.func .*: use torch.autograd.grad, or impl='reference'"


@each_impl
@each
def test_forward_mode_is_refused_instead_of_giving_a_tangent_of_0(name, impl):
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jvp(lambda x: FUNCTIONS[name](x, WEIGHT, impl=impl), (HIDDEN,), (HIDDEN,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
        FUNCTIONS[name](torch.autograd.forward_ad.make_dual(HIDDEN, HIDDEN), WEIGHT, impl=impl)
    with pytest.raises(NotImplementedError, match="lm_head_weight: forward-mode"):
        torch.func.jvp(lambda w: FUNCTIONS[name](HIDDEN, w, impl=impl), (WEIGHT,), (WEIGHT,))


def test_the_tangent_of_a_constant_is_not_lost_either():
    with pytest.raises(NotImplementedError, match="ref_logps: forward-mode"):
        torch.func.jvp(lambda r: fused_npo_loss(HIDDEN, WEIGHT, LABELS, ref_logps=r), (REF_LOGPS,), (REF_LOGPS,))


@each_impl
@each
def test_functional_derivatives_are_refused_with_what_to_use(name, impl):
    def function(x):
        return FUNCTIONS[name](x, WEIGHT, impl=impl)

    for transform in (torch.func.grad(function), torch.func.jacrev(function), torch.func.hessian(function)):
        with pytest.raises(NotImplementedError, match=f"{FUNCTIONAL}|{FORWARD}"):
            transform(HIDDEN)
    with pytest.raises(NotImplementedError, match=FUNCTIONAL):
        torch.func.vjp(function, HIDDEN)


@each_impl
@each
def test_a_hessian_vector_product_is_refused(name, impl):
    def function(x):
        return FUNCTIONS[name](x, WEIGHT, impl=impl)

    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.functional.hvp(function, HIDDEN, HIDDEN)
    with pytest.raises(NotImplementedError, match=f"{FUNCTIONAL}|{FORWARD}"):
        torch.func.jvp(torch.func.grad(function), (HIDDEN,), (HIDDEN,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_impl
@each
def test_vmap_is_a_loop_of_calls(name, impl):
    several = torch.stack((HIDDEN, 0.5 * HIDDEN, HIDDEN.flip(0)))
    mapped = torch.func.vmap(lambda x: FUNCTIONS[name](x, WEIGHT, impl=impl))(several)
    torch.testing.assert_close(mapped, torch.stack([FUNCTIONS[name](x, WEIGHT, impl=impl) for x in several]))


@each
def test_the_reference_has_derivatives_of_every_kind(name):
    def function(x):
        return FUNCTIONS[name](x, WEIGHT.double(), impl="reference")

    x, v = HIDDEN.double(), REF_HIDDEN.double()
    gradient = torch.func.grad(function)(x)
    _, tangent = torch.func.jvp(function, (x,), (v,))
    torch.testing.assert_close(tangent, (gradient * v).sum())
    _, product = torch.autograd.functional.hvp(function, x, v)
    step = 1e-5
    difference = (torch.func.grad(function)(x + step * v) - torch.func.grad(function)(x - step * v)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-5, atol=1e-7)
