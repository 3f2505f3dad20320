"""Rows that a low-precision log-softmax loses: labels pushed down to p = e^-200, and memorised ones at 1 - p = e^-69.

The head has features of its own for them, so that the gaps are exact in every dtype; the other features are ordinary.
"""

from dataclasses import replace

import pytest
import torch

from npo_kernels import fused_linear_kl, fused_logprob_loss, fused_npo_loss, sequence_logprobs, token_logprobs
from tests import support
from tests.support import DTYPES, IMPLS, TINY, evaluate, evaluate_plain_and_oracle, make_batch, name_of, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

V = 300
FORGOTTEN, CERTAIN = 0, 1  # features


def make_extreme(dtype, *, forgotten=(), certain=(), competitor=170, gap=200.0, head="plain"):
    """A batch of ordinary rows but for some positions of the first sequence, given by what becomes of their label.

    forgotten: the label's logit lies `gap` below that of the competitor; certain: it lies 69 above everything.
    """
    batch = make_batch(dtype, head, lengths=(20, 9), prompts=(0, 0), H=24, V=V, spread=1.0)
    batch.hidden[..., :2] = 0
    batch.weight[:, :2] = 0
    labels = batch.labels[0]
    labels[labels == 150] = 20  # the label of the certain rows
    labels[10] = 3
    for t in forgotten:
        labels[t + 1] = 40
        batch.hidden[0, t] = 0
        batch.hidden[0, t, FORGOTTEN] = 4.0
    for t in certain:
        labels[t + 1] = 150
        batch.hidden[0, t] = 0
        batch.hidden[0, t, CERTAIN] = 3.0
    batch.weight[competitor, FORGOTTEN] = gap / 8
    batch.weight[40, FORGOTTEN] = -gap / 8
    batch.weight[150, CERTAIN] = 23.0
    # near the policy: float16 holds no gradient of a sequence that is far below its reference
    logps, _ = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")
    return replace(batch, ref_logps=(logps + torch.tensor([3.0, -5.0])).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("competitor", [1, 170, V - 1])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_log_probability_of_a_forgotten_token_is_right(impl, competitor, dtype):
    batch = make_extreme(dtype, forgotten=(2, 15), competitor=competitor)
    exact = batch.leaves(dtype=torch.float64)(token_logprobs, impl="reference")
    assert exact[0, 2] < -199.9
    for workspace_mb in (None, TINY):
        for needs in ((), ("hidden",)):
            tokens = batch.leaves(needs)(token_logprobs, impl=impl, workspace_mb=workspace_mb)
            assert (tokens.double() - exact).abs().max() < 2e-5
            assert relative_error(tokens[0, 2], exact[0, 2]) < 1e-6


WAYS = {
    "slab": (support.npo, ("hidden", "weight"), None),
    "chunks": (support.npo, ("hidden", "weight"), "chunks"),
    "recompute": (support.npo, ("hidden", "weight"), TINY),
    "outside": (support.tokens, ("hidden", "weight"), TINY),
    "frozen": (support.npo, ("hidden",), None),
    "frozen, sliced": (support.npo, ("hidden",), TINY),
    "frozen, outside": (support.tokens, ("hidden",), TINY),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("competitor", [1, V - 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_through_an_overflowing_row_are_right_in_every_mode(impl, way, competitor, dtype):
    """Forgotten rows share a row block with ordinary ones and with one at the other end."""
    objective, needs, workspace_mb = WAYS[way]
    batch = make_extreme(dtype, forgotten=(2, 15), certain=(5,), competitor=competitor)
    if workspace_mb == "chunks":
        workspace_mb = support.workspace_for(batch, impl, chunks=True)
    plain, oracle = evaluate_plain_and_oracle(objective, batch, needs)
    ours = evaluate(objective, batch, needs, impl=impl, workspace_mb=workspace_mb)
    support.assert_no_worse_than_plain(ours, plain, oracle, slack=1.05, ceiling=False)
    forgotten = ours["hidden"][0, 2], oracle["hidden"][0, 2]
    assert relative_error(*forgotten) < {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]


@pytest.mark.parametrize("gap", [35.0, 45.0, 80.0, 95.0, 600.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_gap_is_right_on_both_sides_of_every_limit(impl, dtype, gap):
    """Of the headrooms (8, 40), of exp in float32 (88) and of its subnormals (103)."""
    batch, needs = make_extreme(dtype, forgotten=(2, 15), gap=gap), ("hidden", "weight")
    for objective in (support.npo, support.tokens):
        plain, oracle = evaluate_plain_and_oracle(objective, batch, needs)
        ours = evaluate(objective, batch, needs, impl=impl)
        # a logit near 80 is off by up to 4e-6 in float32, for plain PyTorch by another amount than for us
        slack = 2.0 if dtype == torch.float32 else 1.05
        support.assert_no_worse_than_plain(ours, plain, oracle, slack, ceiling=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_memorised_token_keeps_its_relative_precision_where_plain_pytorch_has_none(impl, dtype):
    batch = make_extreme(dtype, certain=(5, 12))
    exact = batch.leaves(dtype=torch.float64)
    exact_weight = exact.weight.clone()
    exact = torch.log1p(-_miss(exact.hidden[0, 5], exact_weight, 150))
    assert -1e-26 < exact < -1e-28
    for needs, workspace_mb in (((), None), (("hidden",), TINY)):
        ours = batch.leaves(needs)(token_logprobs, impl=impl, workspace_mb=workspace_mb)[0, 5]
        assert relative_error(ours, exact) < 1e-5
    assert batch(token_logprobs, impl="reference")[0, 5] == 0


def _miss(hidden, weight, label):
    """1 - p of the label in float64, without the cancellation."""
    z = weight @ hidden
    odds = torch.exp(z - z[label])
    odds[label] = 0
    return odds.sum() / (1 + odds.sum())


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_a_memorised_token_keeps_its_relative_precision(impl, dtype, needs):
    """Of the size e^-69, which float16 cannot hold; float64 autograd is exact to 1e-16 of p, so it is done by hand."""
    batch = make_extreme(dtype, certain=(5,))
    hidden, weight = batch.hidden[0, 5].double(), batch.weight.double()
    z = weight @ hidden
    odds = torch.exp(z - z[150])
    odds[150] = 0
    expected = (odds.sum() * weight[150] - odds @ weight) / (1 + odds.sum())
    for workspace_mb in (None, TINY):
        leaves = batch.leaves(needs)
        token = leaves(token_logprobs, impl=impl, workspace_mb=workspace_mb)[0, 5]
        (grad,) = torch.autograd.grad(token, leaves.hidden)
        assert (grad[0, :5] == 0).all() and (grad[0, 6:] == 0).all()
        assert relative_error(grad[0, 5], expected) < {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("label", [0, 63, 64, 127, 128, 255, 256, V - 2, V - 1])
@pytest.mark.parametrize("needs", [("hidden",), ("weight", "bias")], ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_label_at_either_end_of_a_tile_or_in_the_last_ragged_one(impl, needs, label):
    batch = make_batch(head="bias", lengths=(4, 3), prompts=(0, 0), V=V)
    batch.labels[:, 1:] = torch.where(batch.labels[:, 1:] == -100, -100, label)
    for objective, workspace_mb in ((support.npo, None), (support.npo, TINY), (support.tokens, TINY)):
        plain, oracle = evaluate_plain_and_oracle(objective, batch, needs)
        ours = evaluate(objective, batch, needs, impl=impl, workspace_mb=workspace_mb)
        support.assert_no_worse_than_plain(ours, plain, oracle)


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 64, 65, 128, 129])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_vocabulary_size(impl, vocab_size):
    """A vocabulary of one token has one distribution: log-probability and gradients are exactly 0."""
    batch = make_batch(lengths=(5, 3), prompts=(0, 0), V=vocab_size, H=5)
    needs = ("hidden", "weight")
    plain, oracle = evaluate_plain_and_oracle(support.tokens, batch, needs)
    ours = evaluate(support.tokens, batch, needs, impl=impl)
    support.assert_no_worse_than_plain(ours, plain, oracle)
    if vocab_size == 1:
        assert all((value == 0).all() for value in ours.values())


@pytest.mark.parametrize("hidden_size", [1, 2, 31, 32, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_hidden_size(impl, dtype, hidden_size):
    batch = make_batch(dtype, lengths=(5, 3), prompts=(0, 0), V=140, H=hidden_size)
    needs = ("hidden", "weight")
    plain, oracle = evaluate_plain_and_oracle(support.tokens, batch, needs)
    support.assert_no_worse_than_plain(evaluate(support.tokens, batch, needs, impl=impl), plain, oracle, slack=1.1)


@pytest.mark.parametrize("workspace", ["one slab", "chunks", "slices"])
@pytest.mark.parametrize("impl", IMPLS)
def test_small_weights_of_float16_sequences_lose_no_more_than_plain(impl, workspace):
    """Late in unlearning, or with a large normaliser, every coefficient is small: float16 ends at 6e-8."""

    def loss(batch, **options):
        return npo_of_a_large_batch(batch, **options) * 4096.0

    batch, needs = make_batch(torch.float16, "bias"), ("hidden", "weight", "bias")
    sizes = {"one slab": None, "chunks": support.workspace_for(batch, impl, chunks=True), "slices": TINY}
    plain, oracle = evaluate_plain_and_oracle(loss, batch, needs)
    ours = evaluate(loss, batch, needs, impl=impl, workspace_mb=sizes[workspace])
    support.assert_no_worse_than_plain(ours, plain, oracle)


def scaled(objective, scale):
    return lambda batch, **options: objective(batch, **options) * scale


def weak_npo(batch, **options):
    """Sequences that are nearly forgotten: 2 sigmoid(beta r) is about 1.2e-5."""
    return batch(fused_npo_loss, ref_logps=batch.ref_logps + 24.0, beta=0.5, **options)


def weak_user_loss(batch, **options):
    return batch(
        fused_logprob_loss, lambda logps, num_tokens: 1.2e-5 * (logps / num_tokens.clamp(min=1)).sum(), **options
    )


def weak_kl(batch, **options):
    reference = batch.hidden.detach() * 0.5  # exact in every dtype
    return 1.2e-5 * fused_linear_kl(
        batch.hidden, batch.weight, reference, batch.weight.detach(), bias=batch.bias, **options
    )


@pytest.mark.parametrize("workspace", ["one slab", "chunks", "slices"])
@pytest.mark.parametrize("objective", [weak_npo, weak_user_loss, weak_kl], ids=lambda f: f.__name__)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_scale_saves_the_small_gradients_of_float16(impl, objective, workspace):
    """It reaches the gradients after the forward has formed them: rounded before, 99 % of dWeight would be 0."""
    batch = make_batch(torch.float16, "bias")
    needs = ("hidden", "weight", "bias")
    chunks = None if objective is weak_kl else support.workspace_for(batch, impl, chunks=True)  # KL has none
    sizes = {"one slab": None, "chunks": chunks, "slices": TINY}
    loss = scaled(objective, 65536.0)
    plain, oracle = evaluate_plain_and_oracle(loss, batch, needs)
    ours = evaluate(loss, batch, needs, impl=impl, workspace_mb=sizes[workspace])
    support.assert_no_worse_than_plain(ours, plain, oracle)
    for name in needs:
        assert (ours[name] != 0).sum() >= 0.99 * (oracle[name].abs() > 1e-6).sum(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_large_sum_of_one_label_does_not_overflow_float16_before_it_is_scaled(impl):
    """Two tokens of one label, rows of 5e4: their sum is beyond float16, times the upstream gradient it is not."""
    hidden = torch.full((1, 3, 2), 5e4, dtype=torch.float16)
    weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([[0, 1, 1]])
    loss = fused_npo_loss(hidden, weight, labels, ref_logps=torch.tensor([-2.7726]), reduction="sum", impl=impl)
    (grad,) = torch.autograd.grad(loss * 2**-6, weight)
    expected = torch.tensor([-0.5, 1.5, -0.5, -0.5]) * 5e4 / 2**6
    torch.testing.assert_close(grad.float(), expected[:, None].expand(4, 2), rtol=2e-3, atol=0)


@pytest.mark.parametrize("weight", [1e-30, 1e-37, 1e-42])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_that_are_next_to_nothing_are_0_and_not_nan(impl, weight):
    """What takes them into the range of float16 would be 0 itself."""
    batch = make_batch(torch.float16).leaves(("hidden", "weight"))
    weights = torch.full_like(batch.ref_logps, weight)
    loss = batch(fused_npo_loss, ref_logps=batch.ref_logps, weights=weights, impl=impl)
    for grad in torch.autograd.grad(loss, (batch.hidden, batch.weight)):
        assert grad.isfinite().all()


def npo_of_a_large_batch(batch, **options):
    return batch(fused_npo_loss, ref_logps=batch.ref_logps, normalizer=4096, **options)


def test_sums_of_long_sequences_do_not_drift():
    """300 tokens of one sequence, beyond every block of rows."""
    batch = make_batch(lengths=(300,), prompts=(0,), V=64, H=8)
    exact = batch.leaves(dtype=torch.float64)(sequence_logprobs, impl="reference")[0]
    for impl in IMPLS:
        assert relative_error(batch(sequence_logprobs, impl=impl)[0], exact) < 5e-6
