"""Each primitive of both backends against float64: a broken line of one kernel shows here, under its name."""

from dataclasses import replace

import pytest
import torch

from npo_kernels.backends.choose import backend_of
from npo_kernels.core import cpu
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import PADDING_ROW
from npo_kernels.core.lm_head import Head
from npo_kernels.core.matmul import matmul
from npo_kernels.core.softmax_stats import Statistics, anchor_headroom, gradient_coefficients
from tests.support import DEVICE, DTYPES, HEADS, IMPLS, name_of, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

N, H, V = 35, 33, 300  # three row blocks, the last of three rows; two steps of H; three splits, the last ragged
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FLOAT32 = 6e-7  # relative, of a float32 sum


@pytest.fixture(params=IMPLS)
def backend(request):
    return backend_of(request.param)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def make_rows(dtype=torch.float32, head="plain", hidden_size=H):
    """(x, head, target): labels in every tile, the first and the last among them, several of them repeated."""
    has_bias, logit_scale, softcap = HEADS[head]
    target = torch.arange(N) * 37 % V
    target[:4] = torch.tensor([0, V - 1, V - 1, 128])
    return (
        draw(N, hidden_size, dtype=dtype),
        Head(
            draw(V, hidden_size, seed=1, scale=1.5 / hidden_size**0.5, dtype=dtype),
            draw(V, seed=2, dtype=dtype) if has_bias else None,
            logit_scale,
            softcap,
        ),
        target.to(DEVICE),
    )


def exact_logits(x, head):
    z = x.double() @ head.weight.double().t()
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def exact_exponentials(x, head, target, anchor):
    """(E, E times the derivative of the softcap) in float64, the target column zero."""
    z = exact_logits(x, head)
    e = torch.exp(z - anchor.double()[:, None])
    labelled = (target >= 0) & (target < e.shape[1])
    e[labelled, target[labelled]] = 0.0
    return e, e if head.softcap is None else e * (1 - (z / head.softcap) ** 2)


def exact_anchor(x, head, anchor, columns, dtype):
    """The anchor where no logit of the slice exceeds it by more than the headroom, else the largest logit less that."""
    lowest = exact_logits(x, head)[:, slice(*columns)].amax(1) - anchor_headroom(dtype)
    return torch.where(lowest > anchor, lowest, anchor.double())


# ---------------------------------------------------------------------------------------------------------------------
# target_logits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head", HEADS)
def test_target_logits_are_the_gathered_logits(backend, head, dtype):
    x, head, target = make_rows(dtype, head)
    z = backend.target_logits(x, head, target)
    assert z.dtype == torch.float32
    assert relative_error(z, exact_logits(x, head).gather(1, target[:, None]).squeeze(1)) < FLOAT32


def test_a_poisoned_label_gives_a_nan_logit_and_a_filling_row_a_finite_one(backend):
    x, head, target = make_rows()
    target[3], target[7] = V, PADDING_ROW
    z = backend.target_logits(x, head, target)
    assert z.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("hidden_size", [1, 16, 64, 1100])
def test_target_logits_of_any_hidden_size(backend, hidden_size):
    x, head, target = make_rows(hidden_size=hidden_size)
    expected = exact_logits(x, head).gather(1, target[:, None]).squeeze(1)
    assert relative_error(backend.target_logits(x, head, target), expected) < FLOAT32


def test_target_logits_of_a_head_stored_by_columns(backend):
    x, head, target = make_rows(head="bias")
    by_columns = replace(head, weight=head.weight.t().contiguous().t())
    assert torch.equal(backend.target_logits(x, by_columns, target), backend.target_logits(x, head, target))


# ---------------------------------------------------------------------------------------------------------------------
# exp_logits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("columns", [(0, V), (128, V), (128, 256)], ids=str)
def test_exponentials_and_their_sums(backend, head, dtype, columns):
    x, head, target = make_rows(dtype, head)
    anchor = exact_logits(x, head).gather(1, target[:, None]).squeeze(1).float() + 0.5
    slab, parts, raised = backend.exp_logits(x, head, target, anchor, columns)
    torch.testing.assert_close(
        raised.double(), exact_anchor(x, head, anchor, columns, slab.dtype), rtol=1e-6, atol=1e-6
    )
    e, capped = (part[:, slice(*columns)] for part in exact_exponentials(x, head, target, raised))
    assert slab.dtype == backend.slab_dtype(x)
    assert relative_error(parts.sum(0), e.sum(1)) < 2e-6
    assert ((slab.double() - capped).abs() <= (ROUNDING[slab.dtype] + 4e-6) * capped + 1e-7).all()
    assert slab.shape == e.shape


@pytest.mark.parametrize("head", ["plain", "all"])
def test_sums_do_not_need_a_slab(backend, head):
    x, head, target = make_rows(head=head)
    anchor = backend.target_logits(x, head, target)
    _, expected, raised = backend.exp_logits(x, head, target, anchor, (0, V))
    parts, kept = backend.partial_sums(x, head, target, anchor)
    torch.testing.assert_close(parts, expected, rtol=1e-6, atol=0)  # PyTorch does fewer rows at a time
    torch.testing.assert_close(kept, raised, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", ["plain", "all"])
def test_an_exact_anchor_is_taken_as_it_is(backend, head):
    x, head, target = make_rows(head=head)
    anchor = exact_logits(x, head).logsumexp(1).float()
    anchor[5] -= 60.0  # beyond the headroom: must not be repaired here
    _, expected = exact_exponentials(x, head, target, anchor)
    for columns in ((0, V), (37, V - 5)):  # without sums a slice may begin anywhere
        slab = backend.exp_logits_at(x, head, target, anchor, columns)
        assert relative_error(slab, expected[:, slice(*columns)]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("competitor", [1, 140, V - 1])
def test_an_overflowing_row_is_reanchored_and_its_neighbours_are_not(backend, dtype, competitor):
    x, head, target = make_rows(dtype)
    x[18], target[18] = 0, 7
    x[18, 0], head.weight[competitor] = 16.0, 0
    head.weight[competitor, 0], head.weight[7, 0] = 10.0, -2.5  # logits 160 and -40
    anchor = backend.target_logits(x, head, target)
    slab, parts, raised = backend.exp_logits(x, head, target, anchor, (0, V))
    expected = exact_anchor(x, head, anchor, (0, V), slab.dtype)
    torch.testing.assert_close(raised.double(), expected, rtol=1e-6, atol=1e-6)
    assert raised[18] > 119
    assert torch.equal(raised[expected == anchor], anchor[expected == anchor])
    e, _ = exact_exponentials(x, head, target, raised)
    assert (parts.double().sum(0) / e.sum(1) - 1).abs().max() < 2e-6
    assert ((slab.double() - e).abs() <= (ROUNDING[slab.dtype] + 4e-6) * e + 1e-7).all()


@pytest.mark.parametrize("gap", [7.0, 9.0, 39.0, 41.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_a_row_is_reanchored_beyond_the_headroom_and_not_before(backend, dtype, gap):
    x, weight = torch.ones(1, 1, dtype=dtype, device=DEVICE), torch.zeros(V, 1, dtype=dtype, device=DEVICE)
    weight[200] = gap
    anchor, target = torch.zeros(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _, _, raised = backend.exp_logits(x, Head(weight), target, anchor, (0, V))
    headroom = torch.tensor(anchor_headroom(backend.slab_dtype(x)))  # 8.3 or 40.2
    assert raised.item() == max(0.0, (gap - headroom).item())


def test_a_nan_anchor_stays_and_poisons_its_row_alone(backend):
    x, head, target = make_rows()
    target[4] = V
    anchor = backend.target_logits(x, head, target)
    slab, parts, raised = backend.exp_logits(x, head, target, anchor, (0, V))
    for values in (slab, parts.t(), raised[:, None]):
        assert values.isnan().any(1).nonzero().flatten().tolist() == [4]


def test_partial_sums_are_of_fixed_columns_whatever_the_slices(backend):
    """With an anchor known from the start, and with one that a later slice raises and `resum` accounts for."""
    x, head, target = make_rows(head="bias")
    z = backend.target_logits(x, head, target)
    z[7] = -60.0
    _, whole, raised = backend.exp_logits(x, head, target, z, (0, V))
    assert raised[7] > z[7]
    parts, anchor = [], z
    for columns in ((0, 128), (128, V)):
        _, part, anchor = backend.exp_logits(x, head, target, anchor, columns)
        parts.append(part)
    parts = torch.cat(parts)
    assert torch.equal(anchor, raised)
    backend.resum(x, head, target, anchor, anchor > z, parts)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    logp = backend.row_statistics(parts, anchor, z).logp
    expected = z.double() - torch.logaddexp(z.double(), exact_others(x, head, target).logsumexp(1))
    assert relative_error(logp, expected) < FLOAT32


def exact_others(x, head, target):
    return exact_logits(x, head).scatter(1, target[:, None], -torch.inf)


def test_statistics_are_the_log_softmax(backend):
    x, head, target = make_rows(head="all")
    z = backend.target_logits(x, head, target)
    stats = backend.row_statistics(*backend.partial_sums(x, head, target, z), z)
    expected = exact_logits(x, head).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    assert relative_error(stats.logp, expected) < FLOAT32
    assert relative_error(stats.miss, -torch.expm1(expected)) < FLOAT32
    assert relative_error(stats.prob_scale, (expected - z + stats.anchor).exp()) < FLOAT32


def test_exponentials_of_row_slices_of_a_wider_tensor(backend):
    """Rows of x and of the weight need not be contiguous."""
    x, head, target = make_rows(head="bias")
    wide_x, wide_weight = torch.cat((x, x + 1), 1)[:, :H], torch.cat((head.weight, head.weight + 1), 1)[:, :H]
    strided = Head(wide_weight, head.bias)
    z = backend.target_logits(wide_x, strided, target)
    assert torch.equal(z, backend.target_logits(x, head, target))
    for got, expected in zip(
        backend.exp_logits(wide_x, strided, target, z, (128, V)),
        backend.exp_logits(x, head, target, z, (128, V)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# row_statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_row_statistics_keep_their_relative_precision_over_the_whole_range(backend):
    """From 1 - p = 1e-37 to p = e^-300, through anchors at the target and anchors raised above it."""
    sums = torch.logspace(-37, 17, 200, dtype=torch.float64).float()
    sums = torch.cat((sums, torch.logspace(0, 17, 60, dtype=torch.float64).float())).to(DEVICE)
    z = draw(260, scale=20.0)
    gap = torch.zeros(260)
    gap[200:] = torch.linspace(1, 280, 60)
    anchor = z + gap.to(DEVICE)
    odds = (anchor - z).double() + sums.double().log()
    stats = backend.row_statistics(sums[None], anchor, z)
    exact_logp, exact_miss = -torch.nn.functional.softplus(odds, threshold=1e4), torch.sigmoid(odds)
    exact_logp = torch.where(odds < -30, -odds.exp(), exact_logp)
    assert (stats.logp / exact_logp - 1).abs().max() < 5e-7
    assert (stats.miss / exact_miss - 1).abs().max() < 5e-7
    assert (stats.prob_scale * (sums.double() + torch.exp((z - anchor).double())) - 1).abs().max() < 5e-7


def test_nothing_but_the_target_is_a_certain_row(backend):
    zero = torch.zeros(3, device=DEVICE)
    stats = backend.row_statistics(zero[None], zero + 5, zero + 5)
    assert (stats.logp == 0).all() and (stats.miss == 0).all() and (stats.prob_scale == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = (5, 0, 129, 1, 128, 0, 300)  # blocks of 128 rows: exact, one more, several; empty ones


def make_sequences():
    starts = torch.tensor((0, *LENGTHS)).cumsum(0).to(DEVICE)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(DEVICE)
    return sequence, starts


def exact_sums(values, sequence):
    return torch.zeros(len(LENGTHS), dtype=torch.float64, device=DEVICE).index_add(0, sequence, values.double())


def test_sequence_sums_count_each_row_once_for_its_own_sequence(backend):
    sequence, starts = make_sequences()
    values = draw(len(sequence)) - 3
    assert relative_error(backend.sequence_sums(values, sequence, starts), exact_sums(values, sequence)) < 2e-6
    one_each = backend.sequence_sums(torch.ones_like(values), sequence, starts)
    assert one_each.tolist() == list(LENGTHS)


def test_filling_rows_belong_to_no_sequence(backend):
    sequence, starts = make_sequences()
    values = torch.ones(len(sequence) + 4, device=DEVICE)
    sequence = torch.nn.functional.pad(sequence, (0, 4), value=len(LENGTHS))
    assert backend.sequence_sums(values, sequence, starts).tolist() == list(LENGTHS)


@pytest.mark.parametrize("length_normalized", [False, True], ids=["npo", "simnpo"])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_the_ratio_epilogue_is_the_formula(backend, length_normalized, head):
    """The one place besides `formulas.py` where the loss is written, against it, in float64."""
    sequence, starts = make_sequences()
    _, logit_scale, softcap = HEADS[head]
    head = Head(torch.zeros(1, 1), None, logit_scale, softcap)
    n = len(sequence)
    logp = -draw(n, scale=0.05).abs()  # small sums: a float32 sum near -1000 is off by 1e-4 in any implementation
    z = draw(n, seed=1)
    stats = Statistics(z, logp, -torch.expm1(logp), z, draw(n, seed=2).abs())
    offset = draw(len(LENGTHS), seed=3, scale=4.0)
    scale = draw(len(LENGTHS), seed=4).abs()
    ratio = RatioLoss(offset, scale, starts.diff(), 0.7, length_normalized)
    exact = Statistics(*(value.double() for value in vars(stats).values()))
    ratio64 = RatioLoss(offset.double(), scale.double(), starts.diff(), 0.7, length_normalized)
    logps = exact_sums(logp, sequence)
    losses, grad = ratio64.value_and_grad(logps)
    expected = (logps, losses, *gradient_coefficients(exact, grad[sequence], head))
    results = backend.ratio_epilogue(stats, sequence, starts, ratio, head)
    for name, got, truth in zip(("logps", "losses", "row_coef", "target_coef"), results, expected, strict=True):
        assert relative_error(got, truth) < 2e-6, name


def test_the_epilogue_gives_filling_rows_and_forgotten_sequences_no_gradient(backend):
    starts = torch.tensor([0, 2, 4], device=DEVICE)
    sequence = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)  # the last two are filling
    ones = torch.ones(6, device=DEVICE)
    stats = Statistics(ones, -ones, ones / 2, ones, ones.clone())
    stats.prob_scale[2:4] = torch.inf  # whatever the exponentials of a forgotten row are
    ratio = RatioLoss(torch.tensor([0.0, 1e6], device=DEVICE), ones[:2], starts.diff(), 1.0, False)
    _, losses, row_coef, target_coef = backend.ratio_epilogue(stats, sequence, starts, ratio, Head(ones[:1, None]))
    assert losses.isfinite().all()
    for coef in (row_coef, target_coef):
        assert (coef[:2] > 0).all()
        assert (coef[2:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Gradient rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_scaled_rows_are_rounded_once_and_a_zero_scale_wins_over_anything(backend, dtype):
    x, scale = draw(N, H, dtype=dtype), draw(N, seed=1)
    x[3], scale[3] = torch.nan, 0.0
    scaled = backend.scale_rows(x, scale)
    expected = (x.double() * scale.double()[:, None]).to(scaled.dtype)
    expected[3] = 0
    torch.testing.assert_close(scaled, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("hidden_size", [1, H, 1100])  # 1100: a second block of H
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_hidden_gradient_rows_go_to_their_positions(backend, dtype, hidden_size):
    _, head, target = make_rows(dtype, hidden_size=hidden_size)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(3)).to(DEVICE) + 2
    target[5], index[5] = PADDING_ROW, index[6]  # a filling row shares the position of a real one
    product, row_coef, target_coef = draw(N, hidden_size), draw(N, seed=1), draw(N, seed=2)
    out = torch.zeros(N + 4, hidden_size, dtype=dtype, device=DEVICE)
    backend.finish_hidden_grad(product, row_coef, target_coef, head, target, index, out)
    rows = target_coef.double()[:, None] * head.weight.double()[target.clamp(0)] - row_coef.double()[:, None] * product
    expected = torch.zeros(N + 4, hidden_size, dtype=torch.float64, device=DEVICE)
    live = target >= 0
    expected[index[live]] = rows[live]
    assert ((out.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 1e-6).all()
    assert (out[[0, 1, N + 2, N + 3]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("columns", [(0, V), (128, 256)], ids=str)
def test_every_row_of_a_label_is_added_once(backend, dtype, columns):
    """Runs of 1, 8, 9 and 20 equal labels, at both ends of the slice and outside it, on top of what was there."""
    begin, end = columns
    labels = [begin] * 8 + [end - 1] * 9 + [begin + 3] * 20 + [begin + 5, PADDING_ROW, V] + [max(begin - 1, 0), end]
    target = torch.tensor(labels)[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    x, coef = draw(len(labels), H, dtype=dtype), draw(len(labels), seed=1)
    grad = draw(end - begin, H, seed=2)
    expected = grad.double()
    inside = (target >= begin) & (target < end)
    expected = expected.index_add(0, target[inside] - begin, (coef.double()[:, None] * x.double())[inside])
    backend.add_targets(grad, x, coef, backend.group_targets(target), columns)
    assert (grad - expected).abs().max() < 2e-6


def test_targets_are_added_to_a_slice_of_a_gradient_and_to_several_blocks_of_h(backend):
    x, coef, target = draw(12, 1100), draw(12, seed=1), torch.arange(12, device=DEVICE) % 3 + 4
    whole = torch.zeros(12, 1200, device=DEVICE)
    backend.add_targets(whole[2:9, :1100], x, coef, backend.group_targets(target), (2, 9))
    expected = torch.zeros(12, 1200, dtype=torch.float64, device=DEVICE)
    expected[:, :1100].index_add_(0, target, coef.double()[:, None] * x.double())
    assert (whole - expected).abs().max() < 2e-6


# ---------------------------------------------------------------------------------------------------------------------
# Without rows, and the plain products
# ---------------------------------------------------------------------------------------------------------------------


def test_no_rows_are_no_error(backend):
    x, head, target = make_rows()
    x, target = x[:0], target[:0]
    z = backend.target_logits(x, head, target)
    slab, parts, anchor = backend.exp_logits(x, head, target, z, (0, V))
    assert slab.shape == (0, V) and parts.shape[1:] == (0,)
    for sums in ((parts, anchor), backend.partial_sums(x, head, target, z)):
        assert all(values.shape == (0,) for values in vars(backend.row_statistics(*sums, z)).values())
    assert backend.scale_rows(x, z).shape == (0, H)
    grad, out = torch.zeros(V, H, device=DEVICE), torch.zeros(4, H, device=DEVICE)
    backend.add_targets(grad, x, z, backend.group_targets(target), (0, V))
    backend.finish_hidden_grad(x, z, z, head, target, target, out)
    assert (grad == 0).all() and (out == 0).all()
    assert backend.sequence_sums(z, target, torch.zeros(3, dtype=torch.int64, device=DEVICE)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_are_summed_in_float32(monkeypatch, dtype, accumulate):
    """Also over a depth that is cut into blocks, and with a transposed operand."""
    monkeypatch.setattr(cpu, "refusal", lambda dtype: "tests/test_cpu.py has the native ones")
    a, b = draw(50, 7, dtype=dtype).t(), draw(50, 9, seed=1, dtype=dtype)
    start = draw(7, 9, seed=2)
    expected = a.double() @ b.double() + (start.double() if accumulate else 0)
    out = start.clone() if accumulate else None
    result = matmul(a, b, out=out)
    assert result.dtype == torch.float32
    assert out is None or result is out
    assert relative_error(result, expected) < FLOAT32


WAYS = {
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("way", WAYS)
def test_float32_products_of_kernels_are_done_as_pytorch_was_told_in_any_way(way):
    """The first way to ask, of `torch`, is an error once the last was used."""
    from npo_kernels.backends.triton.launch import precision

    x = torch.zeros(1, 1)
    assert precision(x) == "ieee"
    try:
        WAYS[way]()
        assert precision(x) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
