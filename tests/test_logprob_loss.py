"""`fused_logprob_loss`: any loss of sequence log-probabilities, and the ones it has to refuse."""

import pytest
import torch

from npo_kernels import fused_logprob_loss, sequence_logprobs
from npo_kernels.core import formulas
from tests.support import IMPLS, LAYOUTS, TINY, evaluate, make_batch, mixed_loss, name_of, npo, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL_IMPLS = (*IMPLS, "reference")
SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150, "head": "bias"}


def fused(loss_fn):
    return lambda batch, **options: batch(fused_logprob_loss, loss_fn, **options)


@pytest.mark.parametrize("workspace_mb", [None, TINY])
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_it_is_the_loss_of_sequence_logprobs(impl, layout, needs, workspace_mb):
    batch = make_batch(layout=layout, **SMALL)
    run = {"impl": impl, "workspace_mb": workspace_mb}
    expected = evaluate(lambda b, **o: mixed_loss(*b(sequence_logprobs, **o)), batch, needs, **run)
    for name, value in evaluate(fused(mixed_loss), batch, needs, **run).items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_npo_as_a_user_would_write_it_is_the_fused_one(impl):
    batch, needs = make_batch(**SMALL), ("hidden", "weight", "bias")

    def loss_fn(logps, num_tokens):
        losses = formulas.ratio_loss(logps - batch.ref_logps, 0.1)
        return losses[num_tokens > 0].mean()

    expected = evaluate(npo, batch, needs, impl=impl)
    for name, value in evaluate(fused(loss_fn), batch, needs, impl=impl).items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",)], ids=name_of)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_the_loss_is_called_once_with_float32_sums_and_counts(impl, needs):
    calls = []

    def loss_fn(logps, num_tokens):
        calls.append((logps.detach().clone(), num_tokens.clone()))
        return logps.sum()

    batch = make_batch(**SMALL)
    evaluate(fused(loss_fn), batch, needs, impl=impl)
    ((logps, num_tokens),) = calls
    expected, counts = batch(sequence_logprobs, impl=impl)
    assert logps.dtype == torch.float32 and num_tokens.dtype == torch.int64
    assert relative_error(logps, expected) < 1e-6
    assert torch.equal(num_tokens, counts)


CONSTANT = {
    "a constant": lambda logps, num_tokens: torch.tensor(3.0),
    "a loss of detached values": lambda logps, num_tokens: logps.detach().sum(),
    "a constant with a graph": lambda logps, num_tokens: (logps * 0).sum() + 3,
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_that_does_not_depend_on_its_argument_has_connected_zero_gradients(impl, name):
    values = evaluate(fused(CONSTANT[name]), make_batch(**SMALL), ("hidden", "weight"), impl=impl)
    assert (values["hidden"] == 0).all() and (values["weight"] == 0).all()


WRONG = {
    "a vector": (lambda logps, num_tokens: logps, r"0-d tensor, got \(4,\); reduce it with .mean\(\) or .sum\(\)"),
    "a vector of one": (lambda logps, num_tokens: logps.sum()[None], r"got \(1,\)"),
    "a number": (lambda logps, num_tokens: 1.0, "got float"),
    "nothing": (lambda logps, num_tokens: None, "got NoneType"),
    "a count": (lambda logps, num_tokens: num_tokens.sum(), "floating-point tensor, got torch.int64"),
    "a complex number": (lambda logps, num_tokens: logps.sum() * 1j, "floating-point tensor, got torch.complex64"),
}


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",)], ids=name_of)
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_loss_that_returns_no_scalar_is_refused(impl, name, needs):
    loss_fn, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(fused(loss_fn), make_batch(**SMALL), needs, impl=impl)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",)], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_that_would_lose_another_gradient_is_refused(impl, needs):
    margin = torch.ones(4, requires_grad=True)
    for loss_fn in (
        lambda logps, num_tokens: (logps * margin).sum(),
        lambda logps, num_tokens: (logps + (2 * margin).exp()).sum(),
        lambda logps, num_tokens: margin.sum(),
    ):
        with pytest.raises(ValueError, match=r"uses a tensor \(4,\) that requires grad besides logps.*detach it"):
            evaluate(fused(loss_fn), make_batch(**SMALL), needs, impl=impl)
    evaluate(fused(lambda logps, num_tokens: (logps * margin.detach()).sum()), make_batch(**SMALL), needs, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_error_of_the_loss_comes_through(impl):
    def loss_fn(logps, num_tokens):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        evaluate(fused(loss_fn), make_batch(**SMALL), ("hidden",), impl=impl)
