"""`token_statistics`: entropy, maximum, mean and variance of the next-token distributions, and losses made of them."""

import math

import pytest
import torch
import torch.nn.functional as F

from npo_kernels import fused_token_loss, reference, token_logprobs, token_statistics
from npo_kernels.core.lm_head import Head
from npo_kernels.core.row_moments import NAMES
from tests.support import (
    IMPLS,
    LAYOUTS,
    TINY,
    assert_no_worse_than_plain,
    evaluate,
    evaluate_plain_and_oracle,
    make_batch,
    name_of,
    relative_error,
    upstream,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL_IMPLS = (*IMPLS, "reference")
SMALL = {"lengths": (6, 1, 0, 9), "prompts": (2, 0, 0, 0), "H": 20, "V": 150}
ALL = ("hidden", "weight", "bias")


def of(*names):
    """The statistics of these names with weights of their own at every position."""

    def objective(batch, **options):
        values = batch(token_statistics, names, **options)
        shape = (len(names), *batch.labels.shape)
        weights = upstream(shape).to(next(iter(values.values())).dtype)
        return sum((w * values[name]).sum() for w, name in zip(weights, names, strict=True))

    return objective


def written_out(batch):
    """float64 values of all statistics, straight from their definitions."""
    z = batch.logit_scale * F.linear(batch.hidden, batch.weight, batch.bias).double()
    z = z if batch.softcap is None else batch.softcap * torch.tanh(z / batch.softcap)
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=-100)
    p = z.softmax(-1)
    mean_log_p = (p * p.log()).sum(-1)
    values = {
        "logp": p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).log(),
        "entropy": -mean_log_p,
        "max_logit": z.amax(-1),
        "mean_logit": z.mean(-1),
        "var_logp": (p * p.log().square()).sum(-1) - mean_log_p.square(),
    }
    return {name: value * (labels != -100) for name, value in values.items()}


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_they_are_what_their_names_say(impl, head):
    batch = make_batch(head=head, **SMALL)
    values = batch(token_statistics, NAMES, impl=impl)
    assert list(values) == list(NAMES)
    for name, expected in written_out(batch.leaves(dtype=torch.float64)).items():
        assert values[name].dtype == torch.float32 and values[name].shape == batch.labels.shape
        assert relative_error(values[name], expected) < 1e-6, name
        assert (values[name][expected == 0] == 0).all()
    assert relative_error(values["logp"], batch(token_logprobs, impl=impl)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(("name", "head"), [*((name, "plain") for name in NAMES), ("all", "plain"), ("all", "all")])
@pytest.mark.parametrize("impl", IMPLS)
def test_their_gradients_are_no_worse_than_those_of_plain_pytorch(impl, name, head, dtype):
    batch = make_batch(dtype, head=head, **SMALL)
    objective = of(*NAMES) if name == "all" else of(name)
    needs = [n for n in ALL if n in batch.tensors]
    plain, oracle = evaluate_plain_and_oracle(objective, batch, needs)
    # float32: sums of either sign. The mean: plain PyTorch rounds one number a row, ours the whole row of x
    slack = 2.0 if dtype == torch.float32 else 1.5 if name == "mean_logit" else 1.0
    assert_no_worse_than_plain(evaluate(objective, batch, needs, impl=impl), plain, oracle, slack, ceiling=False)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ALL], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_slices_packing_and_num_rows_change_rounding_alone(impl, layout, needs):
    batch = make_batch(head="all", layout=layout, **SMALL)
    expected = evaluate(of(*NAMES), batch, needs, impl="reference", dtype=torch.float64)
    for options in ({}, {"workspace_mb": TINY}, {"num_rows": 14}):
        for part, value in evaluate(of(*NAMES), batch, needs, impl=impl, **options).items():
            # the loss is a small sum of terms of either sign
            assert relative_error(value, expected[part]) < (1e-5 if part == "loss" else 3e-6), (options, part)
    first = batch(token_statistics, NAMES, impl=impl)
    for name, value in batch(token_statistics, NAMES, impl=impl, workspace_mb=TINY).items():
        assert torch.equal(value, first[name]), name


def one_row(logits):
    """(hidden, weight, labels) of a position with these logits, scored on column 0."""
    return torch.ones(1, 1, 1), logits.reshape(-1, 1).float(), torch.zeros(1, 1, dtype=torch.int64)


CERTAIN = {
    "of the target": torch.tensor([30.0, *[0.0] * 150]),
    "of the target, almost": torch.tensor([12.0, 3.0, *[-1.0] * 150]),
    "of another token": torch.tensor([-30.0, *[0.0] * 100, 20.0, *[0.0] * 50]),
    "of two": torch.tensor([5.0, *[-40.0] * 130, 5.0]),
    "of a target that is hopeless": torch.tensor([-400.0, *torch.linspace(-2, 3, 150)]),
    "of nothing": torch.zeros(151),
    "of large logits": torch.linspace(9_000, 9_004, 151),
}


@pytest.mark.parametrize("what", CERTAIN)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_model_that_is_certain(impl, what):
    hidden, weight, labels = one_row(CERTAIN[what])
    values = token_statistics(hidden, weight, labels, NAMES, shift=False, impl=impl)
    oracle = token_statistics(hidden.double(), weight.double(), labels, NAMES, shift=False, impl="reference")
    for name in NAMES:
        found, expected = values[name].item(), oracle[name].item()
        # float32 knows log p to its own size, and what is small of 1 - p to all digits where the target is likely
        floor = 0.0 if name in ("logp", "entropy") and "target," in what else 2e-7
        assert math.isclose(found, expected, rel_tol=1e-5, abs_tol=floor), (name, found, expected)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_columns_that_are_ruled_out_count_for_the_mean_alone(impl):
    """A bias of -inf: whole blocks of columns, the first one among them."""
    batch = make_batch(head="bias", **SMALL)
    open_columns = torch.arange(90, 120)
    bias = torch.full((150,), -torch.inf).index_copy(0, open_columns, batch.bias[open_columns])
    labels = torch.where(batch.labels == -100, -100, 90 + batch.labels % 30)
    names = ("logp", "entropy", "max_logit", "var_logp")
    hidden = batch.hidden.detach().requires_grad_()
    values = token_statistics(hidden, batch.weight, labels, names, bias=bias, impl=impl)
    expected = token_statistics(
        hidden.double(), batch.weight[90:120].double(), labels - 90 * (labels != -100), names,
        bias=batch.bias[open_columns].double(), impl="reference",
    )  # fmt: skip
    weights = upstream((len(names), *labels.shape))
    grads = [
        torch.autograd.grad(sum((w * some[n]).sum() for w, n in zip(weights, names, strict=True)), hidden)[0]
        for some in (values, expected)
    ]
    assert relative_error(grads[0], grads[1].double()) < 1e-5
    for name in names:
        assert relative_error(values[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_the_maximum_goes_to_the_first_that_has_it(impl):
    hidden, weight, labels = one_row(torch.tensor([*[0.0] * 70, 2.0, *[0.0] * 60, 2.0, 2.0]))
    weight.requires_grad_()
    token_statistics(hidden, weight, labels, ["max_logit"], shift=False, impl=impl)["max_logit"].sum().backward()
    assert weight.grad.nonzero().tolist() == [[70, 0]] and weight.grad[70] == 1


@pytest.mark.parametrize("num_rows", [None, 11, 14])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_the_most_likely_token(impl, layout, num_rows):
    batch = make_batch(layout=layout, **SMALL)
    logits = F.linear(batch.hidden, batch.weight)
    scored = written_out(batch)["logp"] != 0 if layout == "padded" else batch(token_logprobs) != 0
    options = {} if num_rows is None else {"num_rows": num_rows}
    found = batch(token_statistics, ["argmax", "logp"], impl=impl, **options)["argmax"]
    assert found.dtype == torch.int64 and not found.requires_grad
    assert torch.equal(found, torch.where(scored, logits.argmax(-1), -100))


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_alone_and_in_a_batch_have_the_same_bits(impl):
    batch = make_batch(**SMALL)
    together = batch(token_statistics, NAMES, impl=impl)
    for s in (0, 3):
        alone = batch.sequences([s])(token_statistics, NAMES, impl=impl)
        for name in NAMES:
            assert torch.equal(alone[name], together[name][s : s + 1]), name


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_has_the_derivatives_of_its_formulas(name):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 3, generator=g, dtype=torch.float64, requires_grad=True) for n in (2, 7))
    targets = torch.tensor([4, 0])
    assert torch.autograd.gradcheck(
        lambda x, w: reference.token_statistics(x, Head(w, None, 0.7, 5.0), targets)[name], (x, w)
    )


def test_a_label_outside_the_vocabulary_poisons_its_row(monkeypatch):
    batch = make_batch(**SMALL)
    batch.labels[0, 4] = 150
    with pytest.raises(ValueError, match=r"labels: 1 outside \[0, 150\)"):
        batch(token_statistics, NAMES, impl="torch")
    monkeypatch.setattr("npo_kernels.core.value_checks.readable", lambda tensor: False)  # as on a GPU
    for impl in ALL_IMPLS:
        for value in batch(token_statistics, NAMES, impl=impl).values():
            assert value[0, 3].isnan() and value.isfinite().sum() == value.numel() - 1


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        (["entropi"], ValueError, r"which: expected names out of .*'entropy'.*, got 'entropi'"),
        ("entropy", TypeError, "which: expected a list of names .*, got 'entropy'"),
        (None, TypeError, "which: expected a list of names .*, got None"),
    ],
)
def test_wrong_names_are_refused(which, error, message):
    with pytest.raises(error, match=message):
        make_batch(**SMALL)(token_statistics, which, impl="torch")


# ---------------------------------------------------------------------------------------------------------------------
# Losses of ten lines
# ---------------------------------------------------------------------------------------------------------------------


def ceu(batch, **options):
    """CE-U: cross-entropy to the model's own distribution without the label. Its gradient is p_y / (1 - p_y) that of
    log p_y, a factor of each row; its value takes the entropy.
    """

    def loss_fn(token_logps, sequence, num_tokens):
        odds = 1 / torch.expm1(-token_logps.detach())
        return (odds * token_logps).mean()

    return batch(fused_token_loss, loss_fn, **options)


def ceu_value(batch, **options):
    with torch.no_grad():
        values = batch(token_statistics, ["logp", "entropy"], **options)
    scored = values["logp"] != 0
    logp, entropy = values["logp"][scored], values["entropy"][scored]
    return ((entropy + logp.exp() * logp) / -torch.expm1(logp)).mean()


def ceu_on_logits(batch):
    """As published: labels masked out of detached logits, then soft cross-entropy."""
    labels = batch.labels[:, 1:]
    scored = labels != -100
    z = F.linear(batch.hidden, batch.weight)[:, :-1][scored]
    teacher = z.detach().scatter(-1, labels[scored].unsqueeze(-1), -torch.inf).softmax(-1)
    return F.cross_entropy(z, teacher)


def pdu(batch, **options):
    """The forget term of PDU: flat logits, (max - mean)^2."""
    values = batch(token_statistics, ["max_logit", "mean_logit"], **options)
    return (values["max_logit"] - values["mean_logit"]).square().sum() / (batch.labels[:, 1:] != -100).sum()


def pdu_on_logits(batch):
    z = F.linear(batch.hidden, batch.weight)[:, :-1][batch.labels[:, 1:] != -100]
    return (z.max(-1).values - z.mean(-1)).square().mean()


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_ceu_and_pdu_are_those_written_on_logits(impl):
    batch, needs = make_batch(**SMALL), ("hidden", "weight")
    for objective, on_logits in ((ceu, ceu_on_logits), (pdu, pdu_on_logits)):
        expected = evaluate(lambda b, f=on_logits, **_: f(b), batch, needs, impl="", dtype=torch.float64)
        found = evaluate(objective, batch, needs, impl=impl)
        for name in needs if objective is ceu else (*needs, "loss"):
            assert relative_error(found[name], expected[name]) < 3e-6, (objective.__name__, name)
    assert relative_error(ceu_value(batch, impl=impl), ceu_on_logits(batch.leaves(dtype=torch.float64))) < 1e-6
