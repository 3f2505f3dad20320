"""fused_linear_kl with a target shift and in the reverse direction, against F.kl_div on logits in float64."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

from npo_kernels import fused_linear_kl
from npo_kernels.core import value_checks
from tests.support import DEVICE, DTYPES, IMPLS, TINY, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

N, H, H_REF, V = 23, 24, 40, 150  # two row blocks, several vocabulary blocks and splits, ragged
VARIANTS = [("forward", 7.3), ("reverse", 0.0), ("reverse", 7.3), ("reverse", -3.0)]
OPTIONS = ({}, {"workspace_mb": TINY}, {"logit_scale": 0.7, "softcap": 4.0, "workspace_mb": TINY})
REDUCTIONS = ("mean", "none", "sum")


def draw(*shape, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def make(dtype):
    """hidden, weight, bias, reference hidden, weight and bias, rounded to the dtype; labels and mask.

    The first, a middle and the last token are labels, -100 stands outside the mask, and one position outside is NaN.
    """
    x, w, b = draw(N, H), draw(V, H, seed=1, scale=1.5 / H**0.5), draw(V, seed=2, scale=0.5)
    ref = draw(N, H_REF, seed=3), draw(V, H_REF, seed=4, scale=1.5 / H_REF**0.5), draw(V, seed=5, scale=0.5)
    labels = torch.arange(N) * 41 % V
    labels[:4] = torch.tensor([0, V - 1, V - 1, 64])
    mask = torch.arange(N) % 4 != 3
    labels[~mask], x[7] = -100, torch.nan
    return [t.to(dtype).to(DEVICE) for t in (x, w, b, *ref)], labels.to(DEVICE), mask.to(DEVICE)


def by_hand(tensors, labels, mask, direction, shift, reduction, logit_scale=1.0, softcap=None, **_):
    """What a careful loop does with the logits of both models."""

    def logits(x, w, b):
        z = F.linear(torch.where(mask[:, None], x, 0.0), w, b)
        z = logit_scale * (z if z.dtype == torch.float64 else z.float())
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z, ref_z = logits(*tensors[:3]), logits(*tensors[3:])
    ref_z = ref_z - shift * F.one_hot(labels.clamp(min=0), V).to(ref_z.dtype)
    logp, ref = z.log_softmax(-1), ref_z.log_softmax(-1)
    source, target = (logp, ref) if direction == "forward" else (ref, logp)
    kl = torch.where(mask, F.kl_div(source, target, reduction="none", log_target=True).sum(-1), 0.0)
    return {"none": kl, "sum": kl.sum(), "mean": kl.sum() / mask.sum()}[reduction]


def evaluate(function, tensors, upstream):
    """(KL, dHidden, dWeight, dBias) for an upstream gradient that is nowhere one."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
    kl = function([*leaves, *tensors[3:]])
    grads = torch.autograd.grad((kl * upstream[: kl.numel()].view(kl.shape).to(kl.dtype)).sum(), leaves)
    return [kl.detach(), *grads]


def fused(labels, mask, direction, shift, impl, **options):
    return lambda t: fused_linear_kl(
        t[0], t[1], t[3], t[4], bias=t[2], ref_bias=t[5], mask=mask, labels=labels, target_shift=shift,
        direction=direction, impl=impl, **options,
    )  # fmt: skip


CASES = [(impl, dtype, *variant) for impl in IMPLS for dtype in DTYPES for variant in VARIANTS]
CASES = [(*case, *more) for case, *more in zip(CASES, cycle(OPTIONS), cycle(REDUCTIONS[:2] + REDUCTIONS), strict=False)]


@pytest.mark.parametrize(("impl", "dtype", "direction", "shift", "options", "reduction"), CASES)
def test_value_and_gradients_are_no_worse_than_plain(impl, dtype, direction, shift, options, reduction):
    tensors, labels, mask = make(dtype)
    upstream = torch.linspace(0.5, 2.0, N, device=DEVICE)

    def plain(t):
        return by_hand(t, labels, mask, direction, shift, reduction, **options)

    exact = evaluate(plain, [t.double() for t in tensors], upstream)
    ours = evaluate(fused(labels, mask, direction, shift, impl, reduction=reduction, **options), tensors, upstream)
    theirs = evaluate(plain, tensors, upstream)
    for name, a, b, c in zip(("kl", "hidden", "weight", "bias"), ours, theirs, exact, strict=True):
        assert relative_error(a, c) <= 1.1 * relative_error(b, c) + 2e-6, name


@pytest.mark.parametrize(("direction", "shift"), VARIANTS)
def test_the_oracle_is_the_formula(direction, shift):
    tensors, labels, mask = make(torch.float64)
    options = {"reduction": "none", "logit_scale": 0.7, "softcap": 4.0}
    upstream = torch.linspace(0.5, 2.0, N, device=DEVICE)
    ours = evaluate(fused(labels, mask, direction, shift, "reference", **options), tensors, upstream)
    theirs = evaluate(lambda t: by_hand(t, labels, mask, direction, shift, **options), tensors, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    def loss(x, w):
        few = slice(0, 3)
        return fused_linear_kl(
            x, w, tensors[3][few], tensors[4][:9], labels=torch.tensor([0, 8, 3], device=DEVICE), target_shift=shift,
            direction=direction, reduction="none", impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (tensors[0][:3].requires_grad_(), tensors[1][:9].requires_grad_()))


@pytest.mark.parametrize("impl", IMPLS)
def test_undial_is_a_cross_entropy_with_soft_labels(impl):
    """Its loss, on the teacher's distribution with the label's logit lowered, is KL and the teacher's entropy."""
    tensors, labels, mask = make(torch.float32)
    tensors, labels = [t[mask] if t.shape[0] == N else t for t in tensors], labels[mask]

    def undial(t):
        soft = (F.linear(*t[3:]) - 10.0 * F.one_hot(labels, V)).softmax(-1)
        entropy = -(soft * soft.log()).sum(-1).mean()
        return F.cross_entropy(F.linear(*t[:3]), soft) - entropy

    one = torch.ones(1, device=DEVICE)
    expected = evaluate(undial, [t.double() for t in tensors], one)
    found = evaluate(fused(labels, None, "forward", 10.0, impl), tensors, one)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_model_has_exactly_zero_kl_and_gradients(impl, direction):
    tensors, _, mask = make(torch.float32)
    tensors[3:] = tensors[:3]
    found = evaluate(fused(None, mask, direction, 0.0, impl), tensors, torch.ones(1, device=DEVICE))
    assert all((t == 0).all() for t in found)


def certain_models(shift):
    """Logits of a model and a teacher, exact in float32, and labels: each row is a way to lose what counts.

    A head that is the identity makes hidden states logits.
    """
    V = 70  # no multiple of a tile: the last label is the one that filling columns repeat
    teacher = draw(6, V, seed=8).float()
    labels = torch.tensor([0, V - 1, 33, V - 1, 65, 2])
    gap = torch.tensor([0.0, 40.0, 120.0, 250.0, shift, 3.0])  # q_y is 1 - 1e-17 and less of a difference
    rows = torch.arange(6)
    teacher[rows, labels] += gap
    teacher[3:] += 500  # where the logits themselves are rounded to 3e-5
    model = draw(6, V, seed=9).float()
    model[1], model[3] = teacher[1], teacher[3]  # before the first step of unlearning
    # and after the last: almost the lowered teacher, in logits of another size
    model[4] = teacher[4] - 500 + 1e-3 * draw(V, seed=10).float()
    model[4, 65] -= shift
    return model, teacher, labels, torch.eye(V)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("shift", [50.0, 300.0, -300.0, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_certain_teacher_and_large_shifts(impl, shift, direction):
    model, teacher, labels, eye = (t.to(DEVICE) for t in certain_models(shift))

    def row_by_row(dtype, impl):
        x = model.to(dtype, copy=True).requires_grad_()
        kl = fused_linear_kl(
            x, eye.to(dtype), teacher.to(dtype), eye.to(dtype), labels=labels, target_shift=shift, direction=direction,
            reduction="none", impl=impl,
        )  # fmt: skip
        return kl.detach(), torch.autograd.grad(kl.sum(), x)[0]

    (kl, grad), (exact_kl, exact_grad) = row_by_row(torch.float32, impl), row_by_row(torch.float64, "reference")
    for row in range(6):
        near = row == 4  # d is known to 1e-6 of 1e-3
        error, size = (grad[row] - exact_grad[row]).norm(), exact_grad[row].norm()
        assert (kl[row] - exact_kl[row]).abs() <= (1e-4 if near else 1e-6) * exact_kl[row] + 1e-15, row
        # p (d - KL) is known to a rounding unit of KL
        assert error <= (1e-3 * size if near else 1e-6 * size + 2e-7 * max(1.0, exact_kl[row])), row


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("impl", IMPLS)
def test_vocabulary_slices_do_not_show_in_the_loss(impl, direction, plans):
    tensors, labels, mask = make(torch.float32)
    one = torch.ones(1, device=DEVICE)
    whole, cut = (
        evaluate(fused(labels, mask, direction, 2.0, impl, workspace_mb=mb), tensors, one) for mb in (None, TINY)
    )
    assert [len(plan.slices) > 1 for plan in plans] == [False, True]
    assert torch.equal(whole[0], cut[0])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(whole[1:], cut[1:], strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_kl_of_positions_may_be_overwritten_before_the_backward(direction):
    tensors, labels, mask = make(torch.float32)
    call = fused(labels, mask, direction, 2.0, "torch", reduction="none")
    weights = torch.linspace(0.5, 2.0, N, device=DEVICE)
    in_place = evaluate(lambda t: call(t).mul_(weights), tensors, torch.ones(N, device=DEVICE))
    for a, b in zip(in_place[1:], evaluate(call, tensors, weights)[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_what_is_not_needed_changes_nothing(impl):
    """Labels without a shift, wrong ones even; the labels outside the mask."""
    tensors, labels, mask = make(torch.float32)
    one = torch.ones(1, device=DEVICE)
    wrong = torch.full_like(labels, V + 7)
    plain = evaluate(fused(None, mask, "forward", 0.0, impl), tensors, one)
    ignored = evaluate(fused(wrong, mask, "forward", 0, impl), tensors, one)
    assert all(map(torch.equal, plain, ignored))
    shifted = evaluate(fused(labels, mask, "reverse", 2, impl), tensors, one)
    others = evaluate(fused(torch.where(mask, labels, wrong), mask, "reverse", 2.0, impl), tensors, one)
    assert all(map(torch.equal, shifted, others)) and not torch.equal(shifted[0], plain[0])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_label_that_is_no_token_raises_or_makes_its_position_nan(impl, direction, monkeypatch):
    tensors, labels, mask = make(torch.float32)
    labels[1], labels[4] = V, -100
    call = fused(labels, mask, direction, 2.0, impl, reduction="none")
    if DEVICE == "cpu":
        message = rf"labels: 2 outside \[0, {V}\) .* the first is {V}: pass mask=labels != -100"
        with pytest.raises(ValueError, match=message):
            call(tensors)
    monkeypatch.setattr(value_checks, "readable", lambda _: False)
    kl, hidden_grad, _, _ = evaluate(call, tensors, torch.ones(N, device=DEVICE))
    assert kl.isnan().nonzero().flatten().tolist() == [1, 4]
    assert hidden_grad.isnan().any(1).nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"target_shift=2\.0 lowers .* pass labels, \(23,\) int64"),
        ({"labels": torch.zeros(N)}, r"labels: expected \(23,\) int64"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, r"labels: expected \(23,\) int64"),
        ({"direction": "backward"}, "direction: expected one of"),
        ({"target_shift": 1e39}, "target_shift: expected a finite number, got 1e.39; float32 holds"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    tensors, labels, mask = make(torch.float32)
    given = {"labels": labels, "target_shift": 2.0, "direction": "reverse", **change}
    given["labels"] = None if given["labels"] is None else given["labels"].to(DEVICE)
    with pytest.raises(ValueError, match=message):
        fused_linear_kl(*tensors[:2], *tensors[3:5], mask=mask, **given)


def test_compiled_under_autocast_and_differentiated_once():
    tensors, labels, mask = make(torch.float32)
    call = fused(labels, mask, "reverse", 2.0, "torch")
    one = torch.ones(1, device=DEVICE)
    compiled = torch.compile(lambda *t: call(t), fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        eager = evaluate(call, tensors, one)
        traced = evaluate(lambda t: compiled(*t), tensors, one)
    rounded = evaluate(call, [t.bfloat16() for t in tensors], one)
    for a, b, c in zip(eager, traced, rounded, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c.to(a.dtype))
    x = tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(call(tensors), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
