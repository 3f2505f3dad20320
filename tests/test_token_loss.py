"""`fused_token_loss`: any loss of token log-probabilities, packed or padded, on every backend."""

import pytest
import torch
import torch.nn.functional as F

from npo_kernels import TokenStats, explain, fused_logprob_loss, fused_token_loss, token_logprobs
from npo_kernels.core import value_checks
from tests.support import (
    IMPLS,
    LAYOUTS,
    TINY,
    assert_no_worse_than_plain,
    evaluate,
    evaluate_plain_and_oracle,
    make_batch,
    mixed_loss,
    name_of,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL_IMPLS = (*IMPLS, "reference")
SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150, "head": "bias"}
ALL = ("hidden", "weight", "bias")


def fused(loss_fn):
    return lambda batch, **options: batch(fused_token_loss, loss_fn, **options)


def uneven(token_logps, sequence, num_tokens):
    """Not linear, not the same for two tokens, and of tokens, sequences and lengths."""
    weights = 1 + torch.arange(token_logps.shape[0]) / 7
    sums = torch.zeros(num_tokens.shape[0], dtype=token_logps.dtype).index_add(0, sequence, token_logps)
    per_token = (weights * F.softplus(token_logps + sequence)).sum()
    return per_token + (sums / num_tokens.clamp(min=1)).square().sum()


def of_all_tokens(batch, **options):
    """The same loss on the result of `token_logprobs`."""
    targets, sequence, num_tokens = scored(batch)
    return uneven(batch(token_logprobs, **options).reshape(-1)[targets], sequence, num_tokens)


def scored(batch):
    """(flat positions of the scored tokens, the sequence of each, their number in each)."""
    found, sequence, start = [], [], 0
    padded = batch.cu_seqlens is None
    ends = range(batch.labels.shape[0]) if padded else batch.cu_seqlens.diff().tolist()
    for s, length in enumerate(ends):
        length = batch.labels.shape[1] if padded else length
        labels = batch.labels.reshape(-1)[start : start + length]
        at = [t for t in range(length - 1) if labels[t + 1] != -100]
        found += [start + t for t in at]
        sequence += [s] * len(at)
        start += length
    sequence = torch.tensor(sequence)
    return torch.tensor(found), sequence, torch.bincount(sequence, minlength=len(ends))


@pytest.mark.parametrize("workspace_mb", [None, TINY])
@pytest.mark.parametrize("needs", [(), ("hidden",), ALL], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_it_is_the_loss_of_token_logprobs(impl, layout, needs, workspace_mb):
    batch = make_batch(layout=layout, **SMALL)
    run = {"impl": impl, "workspace_mb": workspace_mb}
    expected = evaluate(of_all_tokens, batch, needs, **run)
    for name, value in evaluate(fused(uneven), batch, needs, **run).items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("needs", [("hidden",), ALL], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_no_worse_than_plain_pytorch(impl, needs, dtype):
    batch = make_batch(dtype, **SMALL)
    plain, oracle = evaluate_plain_and_oracle(fused(uneven), batch, needs)
    assert_no_worse_than_plain(evaluate(fused(uneven), batch, needs, impl=impl), plain, oracle)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_takes_the_modes_of_the_fused_losses(impl):
    batch = make_batch(**SMALL)
    for needs, mode in (((), "no_grad"), (("hidden",), "frozen"), (ALL, "slab")):
        leaves = batch.leaves(needs)
        plan = explain(fused_token_loss, leaves.hidden, leaves.weight, leaves.labels, bias=leaves.bias, impl=impl)
        assert plan.mode == mode


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_of_sums_is_fused_logprob_loss(impl):
    def of_sums(token_logps, sequence, num_tokens):
        logps = torch.zeros(num_tokens.shape).index_add(0, sequence, token_logps)
        return mixed_loss(logps, num_tokens)

    batch = make_batch(**SMALL)
    expected = evaluate(lambda b, **o: b(fused_logprob_loss, mixed_loss, **o), batch, ALL, impl=impl)
    for name, value in evaluate(fused(of_sums), batch, ALL, impl=impl).items():
        assert relative_error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_mean_is_the_cross_entropy_of_training(impl):
    def plain(batch, **_):
        logits = batch.logit_scale * F.linear(batch.hidden, batch.weight, batch.bias)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())

    batch = make_batch(**SMALL)
    expected = evaluate(plain, batch, ALL, impl="reference")
    for name, value in evaluate(fused(lambda tokens, *_: -tokens.mean()), batch, ALL, impl=impl).items():
        assert relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("needs", [(), ("hidden",)], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_stats_are_what_the_loss_was_given(impl, layout, needs):
    given = []

    def loss_fn(token_logps, sequence, num_tokens):
        given.append((token_logps.detach().clone(), sequence.clone(), num_tokens.clone()))
        return token_logps.sum()

    batch = make_batch(layout=layout, **SMALL).leaves(needs)
    loss, stats = batch(fused_token_loss, loss_fn, impl=impl, return_stats=True)
    ((token_logps, sequence, num_tokens),) = given
    positions, expected, counts = scored(batch)
    assert isinstance(stats, TokenStats) and not any(t.requires_grad for t in vars(stats).values())
    assert torch.equal(stats.token_logps, token_logps) and token_logps.dtype == torch.float32
    assert torch.equal(stats.sequence, expected) and torch.equal(sequence, expected)
    assert torch.equal(stats.num_tokens, counts) and torch.equal(num_tokens, counts)
    assert torch.equal(token_logps, batch(token_logprobs, impl=impl).reshape(-1)[positions])
    assert relative_error(stats.logps.sum(), loss.detach()) < 1e-6 and stats.logps.shape == num_tokens.shape
    _, stats = batch(fused_logprob_loss, mixed_loss, impl=impl, return_stats=True)
    assert torch.equal(stats.num_tokens, counts) and not stats.logps.requires_grad


@pytest.mark.parametrize("needs", [(), ALL], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_num_rows_is_the_number_of_scored_tokens(impl, needs, monkeypatch):
    batch = make_batch(**SMALL)
    count = len(scored(batch)[0])
    expected = evaluate(fused(uneven), batch, needs, impl=impl)
    for name, value in evaluate(fused(uneven), batch, needs, impl=impl, num_rows=count).items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(ValueError, match=rf"num_rows={count + 1} but {count} positions are scored.*leave num_rows out"):
        evaluate(fused(uneven), batch, needs, impl=impl, num_rows=count + 1)
    monkeypatch.setattr(value_checks, "readable", lambda tensor: False)  # as on a GPU
    for value in evaluate(fused(uneven), batch, needs, impl=impl, num_rows=count + 1).values():
        assert value.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_without_weight_has_no_gradient(impl):
    batch = make_batch(**SMALL)
    positions, *_ = scored(batch)
    grad = evaluate(fused(lambda tokens, *_: tokens[1:].sum() - tokens[0] * 0), batch, ("hidden",), impl=impl)["hidden"]
    rows = grad.reshape(-1, batch.hidden.shape[-1])
    assert (rows[positions[0]] == 0).all() and (rows[positions[1:]] != 0).any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_without_a_scored_token(impl):
    batch = make_batch(**SMALL)
    batch.labels.fill_(-100)
    values = evaluate(fused(lambda tokens, *_: tokens.sum()), batch, ALL, impl=impl)
    assert all((value == 0).all() for value in values.values())


def test_a_loss_that_would_lose_a_gradient_and_one_with_other_arguments_are_refused():
    batch, scale = make_batch(**SMALL), torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad besides logps.*result of .*token_logprobs"):
        evaluate(fused(lambda tokens, *_: scale * tokens.sum()), batch, ("hidden",), impl="torch")
    with pytest.raises(TypeError, match=r"loss_fn\(token_logps, sequence, num_tokens\) of 3 positional arguments"):
        evaluate(fused(lambda tokens: tokens.sum()), batch, ("hidden",), impl="torch")
    with pytest.raises(ValueError, match=r"0-d tensor, got \(11,\)"):
        evaluate(fused(lambda tokens, *_: tokens), batch, ("hidden",), impl="torch")
