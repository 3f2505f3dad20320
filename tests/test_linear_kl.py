"""fused_linear_kl against its float64 oracle: value, gradients, memory-bounded chunks, and the ways to misuse it."""

import itertools

import pytest
import torch

from npo_kernels import fused_linear_kl
from npo_kernels.call.call import Execution, KLCall
from npo_kernels.core.lm_head import Head
from npo_kernels.core.task import Needs
from npo_kernels.ops.linear_kl import KLLossCall, linear_kl, linear_kl_loss
from tests.support import IMPLS, TINY, opcheck, relative_error

B, S, H, V, H_REF = 3, 7, 24, 300, 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype, seed=0):
    """hidden, weight, bias, reference hidden and weight, all rounded to the dtype under test, in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, S, H), (V, H), (V,), (B, S, H_REF), (V, H_REF))
    scales = (1, H**-0.5, 0.5, 1, H_REF**-0.5)
    return [
        (torch.randn(shape, generator=g, dtype=torch.float64) * 1.5 * scale).to(dtype).double()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def run(tensors, dtype, impl, upstream, **kwargs):
    """(value, dHidden, dWeight, dBias) in float64, for a non-uniform upstream gradient."""
    hidden, weight, bias, ref_hidden, ref_weight = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    kl = fused_linear_kl(hidden, weight, ref_hidden, ref_weight, bias=bias, impl=impl, **kwargs)
    grads = torch.autograd.grad((kl * upstream[: kl.numel()].view(kl.shape)).sum(), leaves)
    return [kl.detach().double(), *(g.double() for g in grads)]


def plain(tensors, dtype, upstream, mask, reduction, logit_scale=1.0, softcap=None):
    """What a careful loop does in the dtype under test: logits in it, float32 log-softmax."""
    hidden, weight, bias, ref_hidden, ref_weight = (t.detach().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def logps(x, w, b):
        z = torch.nn.functional.linear(x, w, b).float() * logit_scale
        return (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)

    logp, ref = logps(hidden, weight, bias), logps(ref_hidden, ref_weight, None)
    kl = torch.where(mask, (ref.exp() * (ref - logp)).sum(-1), 0.0)
    kl = {"none": kl, "sum": kl.sum(), "mean": kl.sum() / mask.sum()}[reduction]
    grads = torch.autograd.grad((kl * upstream[: kl.numel()].view(kl.shape)).sum(), leaves)
    return [kl.detach().double(), *(g.double() for g in grads)]


CASES = itertools.product(
    IMPLS, DTYPES, ("mean", "sum", "none"), (None, TINY), ({}, {"logit_scale": 0.7, "softcap": 4.0})
)


@pytest.mark.parametrize(("impl", "dtype", "reduction", "workspace_mb", "options"), list(CASES))
def test_value_and_gradients_are_no_worse_than_plain(impl, dtype, reduction, workspace_mb, options):
    tensors = make(dtype)
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) > 0.4
    upstream = torch.linspace(0.5, 2.0, B * S)
    exact = run(tensors, torch.float64, "reference", upstream.double(), mask=mask, reduction=reduction, **options)
    ours = run(tensors, dtype, impl, upstream, mask=mask, reduction=reduction, workspace_mb=workspace_mb, **options)
    theirs = plain(tensors, dtype, upstream, mask, reduction, **options)
    for name, a, b, c in zip(("kl", "hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        floor = 2e-6 * c.norm()  # float32 against float32 is a draw
        assert (a - c).norm() <= 1.1 * (b - c).norm() + floor, name


def test_the_same_model_has_zero_kl_and_zero_gradient():
    hidden, weight, *_ = (t.float() for t in make(torch.float32))
    hidden.requires_grad_()
    kl = fused_linear_kl(hidden, weight, hidden, weight)
    kl.backward()
    assert kl == 0
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_models_that_nearly_agree_keep_their_relative_precision(impl):
    """KL is the square of a small difference: 1e-7 of the logits' size would be all of it."""
    hidden, weight, *_ = (t.float() for t in make(torch.float32))
    near = hidden + 1e-3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    exact = [t.double().requires_grad_() for t in (near, weight)]
    kl64 = fused_linear_kl(*exact, hidden.double(), weight.double(), impl="reference", reduction="none")
    ours = [t.clone().requires_grad_() for t in (near, weight)]
    kl = fused_linear_kl(*ours, hidden, weight, impl=impl, reduction="none")
    plain = fused_linear_kl(near, weight, hidden, weight, impl="reference", reduction="none")
    assert relative_error(kl.detach(), kl64.detach()) < 2e-3 < 0.1 * relative_error(plain, kl64.detach())
    grads = torch.autograd.grad(kl.sum(), ours)
    for got, truth in zip(grads, torch.autograd.grad(kl64.sum(), exact), strict=True):
        assert relative_error(got, truth) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_models_that_are_certain_of_different_tokens(impl, dtype):
    """log p - log q beyond what exp holds, of either sign: KL = 200 nats, the gradient p - q."""
    hidden = torch.tensor([[10.0], [10.0], [-10.0]], dtype=dtype).requires_grad_()
    weight = torch.zeros(150, 1, dtype=dtype)
    weight[3], weight[149] = 10.0, -10.0
    kl = fused_linear_kl(hidden, weight, -hidden, weight, impl=impl, reduction="none")
    torch.testing.assert_close(kl, torch.full((3,), 200.0))
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    torch.testing.assert_close(grad.float(), torch.tensor([[20.0], [20.0], [-20.0]]))


@pytest.mark.parametrize("size", [500.0, 20000.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_are_as_exact_as_those_of_plain_float32(impl, size):
    """A probability formed from z minus a log-sum-exp that was rounded at the logits' size would not be one."""
    hidden, weight, _, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    tensors = [hidden * size / 5, weight, ref_hidden * size / 5, ref_weight]

    def results(tensors, impl):
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        kl = fused_linear_kl(*leaves, *tensors[2:], impl=impl, reduction="none")
        return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)

    exact = results([t.double() for t in tensors], "reference")
    for ours, plain, truth in zip(results(tensors, impl), results(tensors, "reference"), exact, strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 1e-6


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_near_models_is_no_worse_than_plain(impl, distance):
    """Both have the rounding of the logits, which are summed in another order: hence 1.3."""
    hidden, weight, *_ = (t.float() for t in make(torch.float32))
    near = hidden + distance * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))

    def gradients(dtype, impl):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (near, weight)]
        kl = fused_linear_kl(*leaves, hidden.to(dtype), weight.to(dtype), impl=impl)
        return torch.autograd.grad(kl, leaves)

    exact = gradients(torch.float64, "reference")
    for ours, plain, truth in zip(
        gradients(torch.float32, impl), gradients(torch.float32, "reference"), exact, strict=True
    ):
        assert relative_error(ours, truth) <= 1.3 * relative_error(plain, truth) + 2e-7


def test_an_empty_mask_gives_zero_with_connected_zero_gradients():
    hidden, weight, _, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    kl = fused_linear_kl(hidden, weight, ref_hidden, ref_weight, mask=torch.zeros(B, S, dtype=torch.bool))
    kl.backward()
    assert kl == 0
    assert all((t.grad == 0).all() for t in leaves)


def test_positions_outside_the_mask_reach_nothing():
    hidden, weight, _, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 3] = False
    hidden[1, 3], ref_hidden[1, 3] = torch.nan, torch.inf
    hidden.requires_grad_()
    kl = fused_linear_kl(hidden, weight, ref_hidden, ref_weight, mask=mask)
    kl.backward()
    assert kl.isfinite()
    assert hidden.grad.isfinite().all()


def test_opcheck_and_compile():
    hidden, weight, bias, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    x, ref_x = hidden.reshape(-1, H).requires_grad_(), ref_hidden.reshape(-1, H_REF)
    counted = torch.arange(B * S) % 3 > 0
    execution = Execution("torch", 10**7, None, (), Needs(True, True, False))
    call = KLCall(x, Head(weight.requires_grad_(), bias), ref_x, Head(ref_weight), counted, None, 0.0, False, execution)
    opcheck(linear_kl, call)
    opcheck(linear_kl_loss, KLLossCall(call, torch.tensor(0.3)))

    def loss(h, w):
        return fused_linear_kl(h, w, ref_hidden, ref_weight, mask=counted.view(B, S))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(hidden.requires_grad_(), weight), (hidden, weight))
    traced = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_raise():
    hidden, weight, _, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    hidden.requires_grad_()
    kl = fused_linear_kl(hidden, weight, ref_hidden, ref_weight)
    (grad,) = torch.autograd.grad(kl, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
        ({"mask": torch.ones(B, S)}, ValueError, "bool"),
        ({"ref_lm_head_weight": torch.zeros(V + 1, H_REF)}, ValueError, "one vocabulary"),
        ({"ref_hidden": torch.zeros(B, S + 1, H_REF)}, ValueError, "positions of hidden"),
        ({"hidden": torch.zeros(B, S, H, dtype=torch.bfloat16)}, TypeError, "one dtype"),
        ({"hidden": torch.zeros(B, S, H + 1)}, ValueError, "lm_head_weight"),
        ({"temperature": 2.0}, TypeError, "logit_scale"),
    ],
)
def test_bad_input_says_what_to_do(change, error, message):
    hidden, weight, _, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    call = {
        "hidden": hidden, "lm_head_weight": weight, "ref_hidden": ref_hidden, "ref_lm_head_weight": ref_weight,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        fused_linear_kl(**{**call, **change})


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_an_empty_head_is_refused_by_name(impl):
    x, empty, head = torch.zeros(B, H), torch.zeros(0, H), torch.zeros(V, H)
    with pytest.raises(ValueError, match=r"^lm_head_weight is empty"):
        fused_linear_kl(x, empty, x, empty, impl=impl)
    with pytest.raises(ValueError, match=r"^ref_lm_head_weight is empty"):
        fused_linear_kl(x, head, x, empty, impl=impl)


LAYOUTS = {
    "by columns": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "of wider rows": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_of_any_layout(impl, reduction, layout):
    hidden, weight, bias, ref_hidden, ref_weight = (t.float() for t in make(torch.float32))
    tensors = [hidden[0], weight, bias, ref_hidden[0], ref_weight, bias.flip(0)]

    def results(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        x, w, b = leaves
        kl = fused_linear_kl(x, w, *tensors[3:5], bias=b, ref_bias=tensors[5], reduction=reduction, impl=impl)
        return kl.detach(), *torch.autograd.grad(kl.sum(), leaves)

    laid_out = [LAYOUTS[layout](t) for t in tensors]
    for got, expected in zip(results(laid_out), results(tensors), strict=True):
        assert relative_error(got, expected) < 1e-6
