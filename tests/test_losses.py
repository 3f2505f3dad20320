"""The public losses: reductions, statistics, who gets a gradient, and the inputs that a training loop really passes."""

import math
from dataclasses import replace

import pytest
import torch

from npo_kernels import fused_npo_loss, fused_simnpo_loss, sequence_logprobs
from npo_kernels.core import formulas
from tests import support
from tests.support import DTYPES, IMPLS, LAYOUTS, TINY, evaluate, make_batch, name_of, npo, relative_error, simnpo

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL_IMPLS = (*IMPLS, "reference")
SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150}
SCORED = [True, False, False, True]  # the sequences of SMALL that have a scored token


def small(*args, **options):
    return make_batch(*args, **{**SMALL, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Reductions and statistics
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [npo, simnpo])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_mean_and_sum_reduce_what_none_returns(impl, layout, objective):
    batch = small(layout=layout)
    losses = objective(batch, impl=impl, reduction="none")
    assert losses.shape == (4,) and losses.dtype == torch.float32
    assert (losses > 0).tolist() == SCORED
    torch.testing.assert_close(objective(batch, impl=impl, reduction="sum"), losses.sum())
    torch.testing.assert_close(objective(batch, impl=impl, reduction="mean"), losses.sum() / 2)
    for normalizer in (5, 2.5, torch.tensor(5.0), torch.tensor(5)):
        loss = objective(batch, impl=impl, reduction="mean", normalizer=normalizer)
        torch.testing.assert_close(loss, losses.sum() / float(normalizer))


@pytest.mark.parametrize("objective", [npo, simnpo])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_gradients_of_every_reduction_agree_with_the_oracle(impl, reduction, objective):
    def loss(batch, **options):
        losses = objective(batch, reduction=reduction, **options)
        return (losses * support.upstream(losses.shape).to(losses.dtype)).sum()

    batch = small(head="all")
    needs = ("hidden", "weight", "bias")
    plain, oracle = support.evaluate_plain_and_oracle(loss, batch, needs)
    support.assert_no_worse_than_plain(evaluate(loss, batch, needs, impl=impl), plain, oracle)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_statistics_are_the_parts_of_the_loss_and_carry_no_graph(impl, reduction, requires_grad):
    batch = small().leaves(("hidden", "weight") if requires_grad else ())
    exact, counts = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")
    loss, stats = npo(batch, impl=impl, reduction=reduction, return_stats=True, beta=0.3)
    ratio = exact - batch.ref_logps
    assert relative_error(stats.logps, exact) < 1e-6
    assert relative_error(stats.log_ratio, ratio) < 1e-5
    assert relative_error(stats.weight, formulas.ratio_weight(ratio, 0.3)) < 1e-5
    assert stats.num_tokens.tolist() == counts.tolist()
    assert loss.requires_grad == requires_grad
    assert not any(value.requires_grad for value in vars(stats).values())

    loss, stats = batch(fused_simnpo_loss, impl=impl, gamma=0.7, beta=2.0, reduction=reduction, return_stats=True)
    ratio = exact / counts.clamp(min=1) + 0.7
    assert relative_error(stats.log_ratio, ratio) < 1e-5
    assert relative_error(stats.weight, formulas.ratio_weight(ratio, 2.0)) < 1e-5


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",)], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_do_not_change_the_loss(impl, needs):
    batch = small()
    loss, _ = npo(batch.leaves(needs), impl=impl, return_stats=True)
    assert torch.equal(loss, npo(batch.leaves(needs), impl=impl))


# ---------------------------------------------------------------------------------------------------------------------
# Nothing scored
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace_mb", [None, TINY])
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", [npo, simnpo])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_an_all_ignored_batch_is_zero_with_connected_zero_gradients(impl, objective, reduction, needs, workspace_mb):
    def loss(batch, **options):
        return objective(batch, reduction=reduction, workspace_mb=workspace_mb, **options).sum()

    batch = small(head="bias")
    batch = replace(batch, labels=torch.full_like(batch.labels, -100))
    values = evaluate(loss, batch, needs, impl=impl)
    assert all((value == 0).all() for value in values.values())
    assert [values[name].shape for name in needs] == [batch.tensors[name].shape for name in needs]


@pytest.mark.parametrize("normalizer", [None, 3])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_an_all_ignored_batch_of_a_distributed_mean_is_zero_too(impl, normalizer):
    batch = small()
    batch = replace(batch, labels=torch.full_like(batch.labels, -100)).leaves(("hidden",))
    loss = npo(batch, impl=impl, normalizer=normalizer)
    loss.backward()
    assert loss == 0 and (batch.hidden.grad == 0).all()


EMPTY = {
    "no positions": ({"lengths": (0, 0), "prompts": (0, 0)}, "packed"),
    "no positions, padded": ({"lengths": (0, 0), "prompts": (0, 0)}, "padded"),
    "no sequences": ({"lengths": (), "prompts": ()}, "packed"),
    "one position a sequence": ({"lengths": (1, 1), "prompts": (0, 0)}, "padded"),
}


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=name_of)
@pytest.mark.parametrize("num_rows", [None, 0, 4])
@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty_shapes_are_batches_like_others(impl, what, num_rows, needs):
    shape, layout = EMPTY[what]
    batch = small(layout=layout, **shape)
    for objective in (npo, simnpo, support.sequences, support.tokens):
        values = evaluate(objective, batch, needs, impl=impl, num_rows=num_rows)
        assert all((value == 0).all() for value in values.values())


@pytest.mark.parametrize("far", [math.inf, -math.inf, 1e30, math.nan])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_reference_of_an_empty_sequence_does_not_matter(impl, needs, far):
    batch = small()
    expected = evaluate(npo, batch, needs, impl=impl)
    batch.ref_logps[1:3] = far
    for name, value in evaluate(npo, batch, needs, impl=impl).items():
        assert torch.equal(value, expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Who gets a gradient, and how often
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ref_logps", "normalizer"])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_constant_that_wants_a_gradient_is_refused(impl, name):
    batch = small().leaves(("hidden",))
    constants = {"ref_logps": batch.ref_logps, "normalizer": torch.tensor(3.0)}
    wanting = {**constants, name: constants[name].clone().requires_grad_()}
    with pytest.raises(ValueError, match=f"{name}: expected a constant, got .* requires grad: .*detach"):
        batch(fused_npo_loss, **wanting, impl=impl)
    with torch.no_grad():  # where nothing can be lost
        assert not batch(fused_npo_loss, **wanting, impl=impl).requires_grad


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_no_graph_is_made_where_none_is_wanted(impl):
    batch = small().leaves(("hidden", "weight"))
    with torch.no_grad():
        assert not npo(batch, impl=impl).requires_grad
    with torch.inference_mode():
        loss = npo(batch, impl=impl)
    torch.testing.assert_close(loss, npo(batch, impl=impl).detach())


NEEDS = [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")]


@pytest.mark.parametrize("workspace_mb", [None, TINY])
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_tensor_changes_no_other_gradient(impl, needs, workspace_mb):
    batch = small(head="all")
    everything = evaluate(npo, batch, ("hidden", "weight", "bias"), impl=impl, workspace_mb=workspace_mb)
    for name, value in evaluate(npo, batch, needs, impl=impl, workspace_mb=workspace_mb).items():
        # the frozen-head mode sums in another order
        assert relative_error(value, everything[name]) <= (5e-7 if needs == ("hidden",) else 0), name


OBJECTIVES = {
    "npo": npo,
    "npo, by sequence": lambda batch, **options: npo(batch, reduction="none", **options).square().sum(),
    "simnpo": simnpo,
    "user loss": support.user_loss,
    "tokens": support.tokens,
    "sequences": support.sequences,
}


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_graph_may_be_kept_and_walked_again(impl, name, needs):
    batch = small(head="bias").leaves(needs)
    leaves = [batch.tensors[part] for part in needs]
    loss = OBJECTIVES[name](batch, impl=impl)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(-3.0 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, scaled, again, strict=True):
        assert torch.equal(a, c)
        assert relative_error(b, -3.0 * a) < 3e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", ["npo", "user loss"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_backward_makes_no_second_copy_of_a_gradient(impl, name, dtype):
    """It writes into what the forward has kept, and only the last one does."""
    needs = ("hidden", "weight", "bias")
    batch = small(dtype, head="bias").leaves(needs)
    leaves = [batch.tensors[part] for part in needs]

    def gradients(**options):
        """The gradients, and whether each lies in memory that the forward has saved."""
        loss = OBJECTIVES[name](batch, impl=impl)
        saved = {tensor.data_ptr() for tensor in loss.grad_fn.saved_tensors if tensor is not None}
        grads = torch.autograd.grad(-0.7 * loss, leaves, **options)
        return grads, [grad.data_ptr() in saved for grad in grads]

    first, in_place = gradients(retain_graph=True)
    assert in_place == [False] * 3
    last, in_place = gradients()
    wide = dtype is torch.float16  # its dHidden and dBias are kept in float32
    assert in_place == [not wide, True, not wide]
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("upstream", [1.0, -0.7])
@pytest.mark.parametrize("name", ["npo", "user loss"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_that_was_given_away_is_not_scaled_again(impl, name, upstream):
    """A hook that raises keeps autograd from releasing the graph."""
    batch = small().leaves(("weight",))
    loss = OBJECTIVES[name](batch, impl=impl)

    def interrupt(*_):
        raise KeyError("a hook")

    handle = loss.grad_fn.register_hook(interrupt)
    with pytest.raises(KeyError):
        loss.backward(torch.tensor(upstream))
    handle.remove()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(torch.tensor(upstream))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_without_memory_for_its_results_can_be_repeated(impl, monkeypatch):
    """float16: dHidden and dBias take new memory; dWeight is not written before that has worked."""
    needs = ("hidden", "weight", "bias")
    batch = small(torch.float16, head="bias").leaves(needs)
    leaves = [batch.tensors[part] for part in needs]
    upstream, loss, allocate = torch.tensor(-0.7), npo(batch, impl=impl), torch.empty
    expected = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)

    def exhausted(shape, *args, **kwargs):
        if shape == batch.bias.shape and kwargs.get("dtype") == torch.float16:
            raise torch.OutOfMemoryError("out of memory")
        return allocate(shape, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty", exhausted)
        torch.autograd.grad(loss, leaves, upstream)
    again = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("other", ["transposed", "inference"])
def test_what_a_hook_for_saved_tensors_returns_is_not_written(impl, other):
    batch = small().leaves(("weight",))
    (expected,) = torch.autograd.grad(-0.7 * npo(batch, impl=impl), batch.weight)
    given = []

    def unpack(tensor):
        with torch.inference_mode(other == "inference"):
            tensor = tensor.clone()
        if other == "transposed" and tensor.dim() == 2:
            tensor = tensor.t().contiguous().t()
        given.append((tensor, tensor.clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = npo(batch, impl=impl)
    (found,) = torch.autograd.grad(-0.7 * loss, batch.weight)
    assert torch.equal(found, expected) and given
    assert all(torch.equal(a, b) for a, b in given)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_accumulate_over_calls(impl):
    batch = small().leaves(("hidden", "weight"))
    npo(batch, impl=impl).backward()
    once = batch.hidden.grad.clone(), batch.weight.grad.clone()
    npo(batch, impl=impl).backward()
    for leaf, expected in zip((batch.hidden, batch.weight), once, strict=True):
        assert torch.equal(leaf.grad, 2 * expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_upstream_scalar_costs_one_more_rounding_at_most(impl, dtype):
    """Gradients are formed in the forward, in the dtype of the inputs; the factor comes in the backward."""

    def scaled(batch, **options):
        return npo(batch, **options) * 0.3

    needs = ("hidden", "weight", "bias")
    batch = small(dtype, head="bias")
    plain, oracle = support.evaluate_plain_and_oracle(scaled, batch, needs)
    slack = 1.0 if dtype == torch.float32 else 2**0.5  # two roundings of the result instead of one
    support.assert_no_worse_than_plain(evaluate(scaled, batch, needs, impl=impl), plain, oracle, slack)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=name_of)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_an_error_on_every_path(impl, name, needs):
    batch = small().leaves(needs)
    leaves = [batch.tensors[part] for part in needs]
    for retain_graph in (True, False):
        loss = OBJECTIVES[name](batch, impl=impl)
        (grad, *_) = torch.autograd.grad(loss, leaves, create_graph=True, retain_graph=retain_graph)
        with pytest.raises(NotImplementedError, match=r"no second derivatives.*impl='reference'"):
            grad.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tied_weight_gets_both_of_its_gradients(impl):
    """The head is the embedding as well: the gradient of one use must not replace that of the other."""
    batch = small()

    def tied(batch, **options):
        embedded = torch.tanh(batch.weight[batch.labels.clamp(min=0)])
        return npo(replace(batch, hidden=embedded + batch.hidden), **options)

    plain, oracle = support.evaluate_plain_and_oracle(tied, batch, ("weight",))
    support.assert_no_worse_than_plain(evaluate(tied, batch, ("weight",), impl=impl), plain, oracle)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors as they come
# ---------------------------------------------------------------------------------------------------------------------


def spread_out(t):
    """The same values at twice the stride in the last dimension."""
    return torch.stack((t, torch.full_like(t, 3)), dim=-1)[..., 0]


def transposed(t):
    """The same values, the last two dimensions stored the other way round."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def widened(t):
    """The same values as the first half of longer rows."""
    return torch.cat((t, torch.full_like(t, 3)), dim=-1)[..., : t.shape[-1]]


STRIDED = {
    "hidden, part of longer rows": ("hidden", widened),
    "hidden, transposed": ("hidden", transposed),
    "hidden, spread out": ("hidden", spread_out),
    "weight, part of longer rows": ("weight", widened),
    "weight, transposed": ("weight", transposed),
    "weight, spread out": ("weight", spread_out),
    "bias, spread out": ("bias", spread_out),
    "labels, transposed or spread out": ("labels", spread_out),
    "ref_logps, spread out": ("ref_logps", spread_out),
    "cu_seqlens, spread out": ("cu_seqlens", spread_out),
}


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", STRIDED)
@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl, what, layout, needs):
    name, restride = STRIDED[what]
    batch = small(head="bias", layout=layout)
    if getattr(batch, name) is None:
        pytest.skip("a padded batch has no cu_seqlens")
    expected = evaluate(npo, batch, needs, impl=impl)
    strided = replace(batch, **{name: restride(getattr(batch, name))})
    assert torch.equal(getattr(strided, name), getattr(batch, name))
    assert not getattr(strided, name).is_contiguous()
    leaves = [t.detach().requires_grad_(part in needs) for part, t in strided.tensors.items()]  # no copies
    strided = replace(strided, **dict(zip(strided.tensors, leaves, strict=True)))
    loss = npo(strided, impl=impl)
    grads = torch.autograd.grad(loss, [strided.tensors[part] for part in needs])
    assert relative_error(loss, expected["loss"]) < 3e-7
    for part, grad in zip(needs, grads, strict=True):
        assert relative_error(grad, expected[part]) < 2e-6, part


@pytest.mark.parametrize("impl", IMPLS)
def test_one_reference_may_be_expanded_to_all_sequences(impl):
    batch, references = small(), (torch.full((4,), -20.0), torch.tensor(-20.0).expand(4))
    assert torch.equal(*(npo(replace(batch, ref_logps=ref_logps), impl=impl) for ref_logps in references))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("impl", IMPLS)
def test_cu_seqlens_may_have_either_width(impl, dtype):
    batch = small(layout="packed")
    assert torch.equal(npo(replace(batch, cu_seqlens=batch.cu_seqlens.to(dtype)), impl=impl), npo(batch, impl=impl))


@pytest.mark.parametrize("ignore_index", [-1, 0, 149, 10**6])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_any_number_may_mean_ignore_a_token_id_among_them(impl, ignore_index):
    expected = small()
    labels = torch.where(expected.labels == -100, ignore_index, expected.labels)
    batch = replace(expected, labels=labels, ignore_index=ignore_index)
    if 0 <= ignore_index < 150:  # then that token cannot be scored either
        expected = replace(expected, labels=expected.labels.masked_fill(expected.labels == ignore_index, -100))
    assert torch.equal(npo(batch, impl=impl), npo(expected, impl=impl))


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_unshifted_labels_score_their_own_position(impl):
    """Shifting by hand and shift=False is shift=True."""
    batch = small()
    by_hand = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(npo(replace(batch, labels=by_hand, shift=False), impl=impl), npo(batch, impl=impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_losses_are_float32_and_gradients_of_the_inputs_dtype(impl, dtype):
    values = evaluate(npo, small(dtype), ("hidden", "weight"), impl=impl)
    assert values["loss"].dtype == torch.float32 and values["loss"].shape == ()
    assert values["hidden"].dtype == values["weight"].dtype == dtype
