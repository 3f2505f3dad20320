"""Sequence and token log-probabilities: where they are zero, what they sum to, and `num_rows`."""

from dataclasses import replace

import pytest
import torch

from npo_kernels import sequence_logprobs, token_logprobs
from npo_kernels.ops.logprobs import LogpsCall, token_logps
from tests import support
from tests.support import DTYPES, IMPLS, LAYOUTS, TINY, evaluate, make_batch, name_of, npo, relative_error, user_loss

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL_IMPLS = (*IMPLS, "reference")
SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150}


def small(*args, **options):
    return make_batch(*args, **{**SMALL, **options})


@pytest.mark.parametrize("head", support.HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_log_probabilities_are_right_to_float32_in_every_dtype(impl, dtype, head):
    """16-bit inputs are multiplied exactly and summed in float32: nothing of the logits is rounded to 16 bits."""
    batch = small(dtype, head, lengths=(6, 1, 0, 20), V=300)
    exact = batch.leaves(dtype=torch.float64)
    for function in (lambda b, i: b(token_logprobs, impl=i), lambda b, i: b(sequence_logprobs, impl=i)[0]):
        assert relative_error(function(batch, impl), function(exact, "reference")) < 1e-6


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_tokens_sum_to_their_sequences_and_are_zero_where_nothing_is_scored(impl, layout, shift):
    batch = replace(small(layout=layout), shift=shift)
    tokens = batch(token_logprobs, impl=impl)
    logps, num_tokens = batch(sequence_logprobs, impl=impl)
    assert tokens.shape == batch.labels.shape and tokens.dtype == logps.dtype == torch.float32
    by_sequence = tokens if layout == "padded" else batch.unpacked(tokens)
    torch.testing.assert_close(by_sequence.sum(1), logps)
    assert (by_sequence != 0).sum(1).tolist() == num_tokens.tolist()
    assert num_tokens.dtype == torch.int64
    # 6 and 9 labels with 2 and 0 of a prompt, one hole in the longer; the shift takes each first label that is in place
    assert num_tokens.tolist() == ([4, 0, 0, 7] if shift else [4, 1, 0, 8])


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_entry_t_is_the_log_probability_of_label_t_plus_1(impl):
    batch = small()
    tokens = batch(token_logprobs, impl=impl)
    logps = torch.log_softmax(batch.hidden.double() @ batch.weight.double().t(), -1)
    for s, t in ((0, 1), (0, 4), (3, 0), (3, 7)):
        assert tokens[s, t].item() == pytest.approx(logps[s, t, batch.labels[s, t + 1]].item(), rel=1e-5)
    assert (tokens[:, -1] == 0).all()


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_operator_adds_the_gradients_of_both_of_its_results(impl, needs):
    batch = small(head="bias", layout="packed").leaves(needs)

    def both(scale_tokens, scale_logps):
        results = token_logps(LogpsCall(support.call_of(batch, impl), per_token=True))
        tokens, logps = results.tokens, results.logps
        loss = scale_tokens * (tokens * support.upstream(tokens.shape)).sum()
        loss = loss + scale_logps * (logps * support.upstream(logps.shape)).sum()
        return torch.autograd.grad(loss, [batch.tensors[name] for name in needs])

    for together, tokens_alone, logps_alone in zip(both(1, 1), both(1, 0), both(0, 1), strict=True):
        assert relative_error(together, tokens_alone + logps_alone) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# num_rows
# ---------------------------------------------------------------------------------------------------------------------

OBJECTIVES = {"npo": npo, "user loss": user_loss, "tokens": support.tokens, "sequences": support.sequences}


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("workspace_mb", [None, TINY])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_number_of_rows_changes_nothing_nor_does_a_bound_above_it(impl, name, workspace_mb, needs):
    batch = small(head="bias", layout="packed")
    run = {"impl": impl, "workspace_mb": workspace_mb}
    expected = evaluate(OBJECTIVES[name], batch, needs, **run)
    for num_rows in (batch.num_scored, batch.num_scored + 7):
        values = evaluate(OBJECTIVES[name], batch, needs, num_rows=num_rows, **run)
        for part, value in values.items():
            # the vendor's products may sum in another order when there are more rows
            assert relative_error(value, expected[part]) <= 5e-7, (num_rows, part)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_too_few_rows_are_refused(impl):
    batch = small()
    for objective in OBJECTIVES.values():
        with pytest.raises(ValueError, match=f"num_rows={batch.num_scored - 1} but {batch.num_scored} positions"):
            objective(batch, impl=impl, num_rows=batch.num_scored - 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("extra", [None, 0, 5])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight", "bias")], ids=name_of)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_hidden_state_at_an_ignored_position_reaches_nothing(impl, name, needs, extra, bad):
    """Position 0 among them, which filling rows point at."""
    batch = small(head="bias")
    num_rows = None if extra is None else batch.num_scored + extra
    expected = evaluate(OBJECTIVES[name], batch, needs, impl=impl, num_rows=num_rows)
    ignored = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=-100) == -100
    assert ignored[0, 0] and ignored.sum() > 10
    hidden = torch.where(ignored[..., None], bad, batch.hidden)
    values = evaluate(OBJECTIVES[name], replace(batch, hidden=hidden), needs, impl=impl, num_rows=num_rows)
    for part, value in values.items():
        assert torch.equal(value, expected[part]), part
