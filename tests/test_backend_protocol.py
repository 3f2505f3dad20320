"""Every primitive of `core.backend.Backend`, on both backends, against the PyTorch that its docstring names.

In float64 on the same rounded inputs; shapes and dtypes as declared. `tests/test_backends.py` has what goes wrong at
the edges of each.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.backends.choose import backend_of
from npo_kernels.core import formulas, layout, softmax_stats
from npo_kernels.core.backend import Backend
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.row_moments import GradientRows, join
from npo_kernels.core.softmax_stats import Divergence, Lowered, Normalizers, Statistics
from tests.support import DEVICE, DTYPES, HEADS, IMPLS, name_of, relative_error
from tests.test_backends import H, N, V, draw, exact_exponentials, exact_logits, make_rows

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")

ALL = (0, V)
STARTS = torch.tensor([0, 9, 9, 30, N], device=DEVICE)
SEQUENCE = torch.repeat_interleave(torch.arange(4, device=DEVICE), STARTS.diff())
Result = list[tuple[Tensor, Tensor, torch.dtype]]  # (the result, its float64 counterpart, the declared dtype)


class Rows:
    """The arguments that most primitives share, and their float64 counterparts."""

    def __init__(self, backend: Backend, dtype: torch.dtype, head: str):
        self.backend, self.dtype = backend, dtype
        self.x, self.head, self.target = make_rows(dtype, head)
        self.z = exact_logits(self.x, self.head)
        self.anchor = self.z.gather(1, self.target[:, None])[:, 0].float() + 0.5
        self.slab_dtype = backend.slab_dtype(self.x)
        self.slope = 1 if self.head.softcap is None else 1 - (self.z / self.head.softcap) ** 2

    def blocks(self, values: Tensor) -> list[Tensor]:
        """(n, V) cut into what one partial sum is of."""
        return list(values.split(self.backend.block_v(self.x), 1))

    def reference(self) -> tuple[Tensor, Head]:
        """A second model."""
        weight = draw(V, H, seed=12, scale=1.5 / H**0.5, dtype=self.dtype)
        return draw(N, H, seed=11, dtype=self.dtype), Head(weight, None, self.head.logit_scale, self.head.softcap)

    def lowered(self, z: Tensor, lowered: Lowered | None) -> Tensor:
        return z if lowered is None else z - lowered.shift * F.one_hot(lowered.target, V)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        return draw(N, seed=5), draw(N, seed=6)


def block_v(r: Rows) -> Result:
    width = r.backend.block_v(r.x)
    assert isinstance(width, int) and 0 < width < V
    return []


def slab_dtype(r: Rows) -> Result:
    assert r.slab_dtype in (r.dtype, torch.float32)
    return []


def describe(r: Rows) -> Result:
    text = r.backend.describe(r.x)
    assert text and "\n" not in text
    return []


def scratch(r: Rows) -> Result:
    found = r.backend.scratch(r.x, N, V, True)
    assert isinstance(found, Scratch) and min(found) >= 0 and found.sums > 0
    return []


def kl_scratch(r: Rows) -> Result:
    found = r.backend.kl_scratch(r.x, r.head, *r.reference())
    assert isinstance(found, Scratch) and min(found) >= 0 and found.sums > 0
    return []


def compact(r: Rows) -> Result:
    """tests/test_layout.py has every shape of a batch."""
    labels = torch.where(torch.arange(N, device=DEVICE) % 4 == 1, -7, r.target)
    cu_seqlens, found = STARTS.int(), None
    for num_rows in (None, N):
        found = r.backend.compact(labels, cu_seqlens, True, V, -7, num_rows)
        expected = layout.compact(*layout.flatten(labels, cu_seqlens, True, -7), V, -7, num_rows)
        for name, value in vars(expected).items():
            got = vars(found)[name]
            assert torch.equal(got, value) if isinstance(value, Tensor) else got == value, name
    return []


def gather_rows(r: Rows) -> Result:
    """A filling row points at what must not be read into a result."""
    index, target = (
        torch.tensor([3, 5, 0, 0], device=DEVICE),
        torch.tensor([7, 8, layout.PADDING_ROW, layout.PADDING_ROW]),
    )
    rows = layout.Rows(index, target.to(DEVICE), *3 * [index], host_starts=None)
    x = r.x.clone()
    x[0] = torch.nan
    return [
        (r.backend.gather_rows(x, rows), torch.cat((x[[3, 5]].double(), torch.zeros_like(x[:2]).double())), r.dtype)
    ]


def coefficients(r: Rows) -> Result:
    stats = Statistics(r.anchor, -r.anchor.abs(), *(draw(N, seed=s).abs() for s in (4, 5, 6)))
    sequence, target = SEQUENCE.clone(), r.target.clone()
    sequence[-2:], target[-2:] = 4, layout.PADDING_ROW
    index = torch.arange(N, device=DEVICE) * 2
    index[-2:] = 0
    rows = layout.Rows(index, target, sequence, STARTS, STARTS.diff(), host_starts=None)
    tokens, logps = draw(2 * N, seed=7), draw(4, seed=8)
    wide, found = Statistics(*(t.double() for t in vars(stats).values())), []
    for per_token, per_sequence in ((tokens, logps), (None, logps), (tokens, None)):
        grad = torch.zeros(N, dtype=torch.float64, device=DEVICE)
        grad += 0 if per_token is None else per_token[index]
        grad += 0 if per_sequence is None else F.pad(per_sequence, (0, 1))[sequence]
        grad[-2:] = 0
        expected = softmax_stats.gradient_coefficients(wide, grad, r.head)
        found += zip(r.backend.coefficients(stats, rows, per_token, per_sequence, r.head), expected, strict=True)
    return [(got, value, torch.float32) for got, value in found]


def sequence_scale(r: Rows) -> Result:
    num_tokens, found = torch.arange(300, device=DEVICE) % 3, []
    normalizers = [None, *(torch.tensor(value, device=DEVICE) for value in (7.0, 0.0, torch.inf, torch.nan))]
    for reduction, normalizer in (("sum", None), *(("mean", normalizer) for normalizer in normalizers)):
        scale = r.backend.sequence_scale(num_tokens, reduction, normalizer)
        expected = formulas.sequence_scale(num_tokens, reduction, normalizer)
        torch.testing.assert_close(scale, expected, rtol=0, atol=0, equal_nan=True)
        found.append((scale.nan_to_num(), expected.nan_to_num().double(), torch.float32))
    return found[:3]


def target_logits(r: Rows) -> Result:
    return [(r.backend.target_logits(r.x, r.head, r.target), r.z.gather(1, r.target[:, None])[:, 0], torch.float32)]


def empty_slab(r: Rows) -> Result:
    slab = r.backend.empty_slab(r.x, (37, 290))
    assert slab.shape == (N, 253) and slab.dtype == r.slab_dtype
    return []


def exp_logits(r: Rows) -> Result:
    out = r.backend.empty_slab(r.x.repeat(2, 1), ALL)[:N]
    slab, parts, anchor = r.backend.exp_logits(r.x, r.head, r.target, r.anchor, ALL, out=out)
    assert slab is out
    e, stored = exact_exponentials(r.x, r.head, r.target, anchor)
    sums = torch.stack([block.sum(1) for block in r.blocks(e)])
    highest = r.z.amax(1) - softmax_stats.anchor_headroom(r.slab_dtype)
    expected = torch.maximum(r.anchor.double(), highest)
    return [(slab, stored, r.slab_dtype), (parts, sums, torch.float32), (anchor, expected, torch.float32)]


def exp_logits_at(r: Rows) -> Result:
    anchor = r.z.logsumexp(1).float()
    room = r.backend.empty_slab(r.x, (0, 290))
    slab = r.backend.exp_logits_at(r.x, r.head, r.target, anchor, (37, 290), out=room[:, :253])
    assert slab.data_ptr() == room.data_ptr()
    return [(slab, exact_exponentials(r.x, r.head, r.target, anchor)[1][:, 37:290], r.slab_dtype)]


def partial_sums(r: Rows) -> Result:
    parts, anchor = r.backend.partial_sums(r.x, r.head, r.target, r.anchor)
    e, _ = exact_exponentials(r.x, r.head, r.target, anchor)
    return [(parts, torch.stack([block.sum(1) for block in r.blocks(e)]), torch.float32)]


def resum(r: Rows) -> Result:
    anchor = r.z.logsumexp(1).float()
    e, _ = exact_exponentials(r.x, r.head, r.target, anchor)
    sums = torch.stack([block.sum(1) for block in r.blocks(e)])
    raised = torch.arange(N, device=DEVICE) % 3 == 1
    parts = torch.where(raised, 7.0, sums.float())
    r.backend.resum(r.x, r.head, r.target, anchor, raised, parts)
    return [(parts, sums, torch.float32)]


def row_statistics(r: Rows) -> Result:
    parts, anchor, z = draw(3, N, seed=4).abs(), draw(N, seed=5), draw(N, seed=5) - 0.25
    found = r.backend.row_statistics(parts, anchor, z)
    exact = softmax_stats.row_statistics(parts.double(), anchor.double(), z.double())
    return [(vars(found)[name], value, torch.float32) for name, value in vars(exact).items()]


def softmax_sums(r: Rows) -> Result:
    found = []
    for lowered in (None, Lowered(r.target, 2.5), Lowered(r.target, -40.0)):
        z = r.lowered(r.z, lowered)
        maxima, sums = r.backend.softmax_sums(r.x, r.head, r.x, lowered)
        # the blocks are the backend's own: what the row says is what counts
        total = (sums.double() * torch.exp(maxima.double() - maxima.amax(0).double())).sum(0)
        exact = torch.exp(z - z.amax(1, keepdim=True)).sum(1)
        assert maxima.shape == sums.shape
        found += [(maxima.amax(0), z.amax(1), torch.float32), (total.float(), exact, sums.dtype)]
    return found


def kl_logits(r: Rows) -> Result:
    found, (ref_x, ref_head) = [], r.reference()
    crossed = r.head.softcap is not None  # all four in two heads; `tests/test_kl_directions.py` has every one
    for lowered, reverse in ((None, crossed), (Lowered(r.target, 2.5), not crossed)):
        ref_z = r.lowered(exact_logits(ref_x, ref_head), lowered)
        ends = [(z.amax(1), torch.exp(z - z.amax(1, keepdim=True)).sum(1)) for z in (r.z, ref_z)]
        vectors = Normalizers(*(t.float() for pair in ends for t in pair)).vectors()
        p, q = r.z.softmax(1), ref_z.softmax(1)
        grad, kl = p - q, (q * (q / p).log() + p - q).sum(1)
        if reverse:
            kl = (p * (p / q).log() + q - p).sum(1)
            grad = p * ((p / q).log() - kl[:, None])
        divergence = Divergence(vectors, lowered, reverse, kl.float())
        slab, parts = r.backend.kl_logits(r.x, r.head, ref_x, ref_head, divergence, ALL)
        values = r.backend.kl_sums(r.x, r.head, ref_x, ref_head, replace(divergence, kl=None))
        assert torch.equal(parts, values)
        found += [(slab, grad * r.slope, r.slab_dtype), (parts.sum(0), kl, parts.dtype)]
        begin = r.backend.block_v(r.x)
        room = r.backend.empty_slab(r.x, ALL)[:, : V - begin]
        part, _ = r.backend.kl_logits(r.x, r.head, ref_x, ref_head, divergence, (begin, V), out=room)
        assert part is room
        found.append((part, (grad * r.slope)[:, begin:], r.slab_dtype))
    return found


def scale_rows(r: Rows) -> Result:
    scale = draw(N, seed=3)
    scale[4], r.x[4] = 0.0, torch.inf
    expected = torch.where(scale[:, None] == 0, 0.0, scale[:, None].double() * r.x.double())
    scaled, negated = r.backend.scale_rows(r.x, scale), r.backend.scale_rows(r.x, scale, sign=-1.0)
    assert torch.equal(scaled, -negated)
    return [(scaled, expected, r.slab_dtype)]


def finish_hidden_grad(r: Rows) -> Result:
    (row_coef, target_coef), product = r.coefficients(), draw(N, H, seed=7)
    index = torch.arange(N, device=DEVICE) * 2 + 1
    out = torch.zeros(2 * N + 1, H, dtype=r.dtype, device=DEVICE)
    r.backend.finish_hidden_grad(product, row_coef, target_coef, r.head, r.target, index, out)
    expected = torch.zeros(out.shape, dtype=torch.float64, device=DEVICE)
    expected[index] = (
        target_coef[:, None].double() * r.head.weight[r.target].double() - row_coef[:, None] * product.double()
    )
    return [(out, expected, r.dtype)]


def add_targets(r: Rows) -> Result:
    """With what `group_targets` of the same backend makes of the targets."""
    coef, (begin, end) = draw(N, seed=5), (37, 290)
    grad = draw(end - begin, H, seed=8)
    expected = grad.double()
    inside = (r.target >= begin) & (r.target < end)
    expected.index_add_(0, r.target[inside] - begin, (coef[:, None] * r.x.double())[inside])
    r.backend.add_targets(grad, r.x, coef, r.backend.group_targets(r.target), (begin, end))
    return [(grad, expected, torch.float32)]


def moment_scratch(r: Rows) -> Result:
    found = r.backend.moment_scratch(r.x, N, V, True)
    assert isinstance(found, Scratch) and min(found) >= 0 and found.sums > 0
    return []


def row_moments(r: Rows) -> Result:
    """Joined, since the blocks are a backend's own."""
    found = join(r.backend.row_moments(r.x, r.head, r.target))
    maximum, argmax = r.z.max(1)
    assert torch.equal(found.argmax, argmax)
    below = r.z - maximum[:, None]
    inside = (r.target >= 0) & (r.target < V)
    e = below.exp()
    e[inside, r.target[inside]] = 0
    expected = maximum, *((e * below**k).sum(1) for k in range(3)), r.z.sum(1)
    got = found.maximum, found.total, found.first, found.second, found.logits
    return [(a.float(), b, torch.float32) for a, b in zip(got, expected, strict=True)]


def moment_gradient(r: Rows) -> Result:
    maximum, argmax = r.z.max(1)
    rows = GradientRows(maximum.float(), *(draw(N, seed=20 + k) for k in range(5)), argmax)
    c = r.z - rows.anchor.double()[:, None]
    e, c = c.exp(), c - rows.center[:, None]
    curve = rows.constant[:, None] + rows.linear[:, None] * c + rows.square[:, None] * c**2
    expected = (e * curve + rows.flat[:, None]) * r.slope
    inside = (r.target >= 0) & (r.target < V)
    expected[inside, r.target[inside]] = 0
    expected[torch.arange(N), argmax] = 0
    begin, end = 70, V - 3
    room = r.backend.empty_slab(r.x, ALL)[:, : end - begin]
    slab = r.backend.moment_gradient(r.x, r.head, r.target, rows, (begin, end), out=room)
    assert slab is room
    return [(slab, expected[:, begin:end], r.slab_dtype)]


def scale_gradient(r: Rows) -> Result:
    """In its own dtype and, kept wider, to that of the inputs; of a matrix and of a vector, with a unit and without."""
    unit, upstream = 2.0 ** (torch.arange(N, device=DEVICE) % 9 - 5), torch.tensor(-0.37, device=DEVICE)
    found = []
    for grad, factor in ((r.x, None), (r.x[:, 0], None), (r.x.float(), None), (r.x, unit), (r.x[:, 0], unit)):
        before, scale = grad.clone(), upstream.double() * (1 if factor is None else factor.double())
        expected = grad.double() * scale.reshape(-1, *[1] * (grad.dim() - 1))
        found.append((r.backend.scale_gradient(grad, factor, upstream, r.dtype), expected, r.dtype))
        assert torch.equal(grad, before)
    return found


def sequence_sums(r: Rows) -> Result:
    values = draw(N, seed=9)
    expected = torch.zeros(4, dtype=torch.float64, device=DEVICE).index_add_(0, SEQUENCE, values.double())
    return [(r.backend.sequence_sums(values, SEQUENCE, STARTS), expected, torch.float32)]


def ratio_epilogue(r: Rows) -> Result:
    logp = -draw(N, seed=4).abs()
    stats = Statistics(r.anchor, logp, 1 - logp.exp(), r.anchor, draw(N, seed=6).abs())
    ratio = RatioLoss(draw(4, seed=2) * 9, draw(4, seed=3).abs(), STARTS.diff(), 0.3, length_normalized=False)
    found = r.backend.ratio_epilogue(stats, SEQUENCE, STARTS, ratio, r.head)
    wide = Statistics(*(t.double() for t in vars(stats).values()))
    exact = RatioLoss(ratio.offset.double(), ratio.scale.double(), ratio.num_tokens, 0.3, length_normalized=False)
    logps = torch.zeros(4, dtype=torch.float64, device=DEVICE).index_add_(0, SEQUENCE, wide.logp)
    losses, grad = exact.value_and_grad(logps)
    expected = (logps, losses, *softmax_stats.gradient_coefficients(wide, F.pad(grad, (0, 1))[SEQUENCE], r.head))
    return [(got, value, torch.float32) for got, value in zip(found, expected, strict=True)]


PRIMITIVES: dict[str, Callable[[Rows], Result]] = {
    "block_v": block_v,
    "slab_dtype": slab_dtype,
    "describe": describe,
    "scratch": scratch,
    "kl_scratch": kl_scratch,
    "empty_slab": empty_slab,
    "compact": compact,
    "gather_rows": gather_rows,
    "coefficients": coefficients,
    "sequence_scale": sequence_scale,
    "target_logits": target_logits,
    "exp_logits": exp_logits,
    "exp_logits_at": exp_logits_at,
    "partial_sums": partial_sums,
    "resum": resum,
    "row_statistics": row_statistics,
    "softmax_sums": softmax_sums,
    "kl_logits": kl_logits,
    "kl_sums": kl_logits,
    "scale_rows": scale_rows,
    "finish_hidden_grad": finish_hidden_grad,
    "group_targets": add_targets,
    "add_targets": add_targets,
    "moment_scratch": moment_scratch,
    "row_moments": row_moments,
    "moment_gradient": moment_gradient,
    "scale_gradient": scale_gradient,
    "sequence_sums": sequence_sums,
    "ratio_epilogue": ratio_epilogue,
}
# Relative error of a whole result: float32 sums in any order, and one rounding to 16 bits.
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("primitive", dict.fromkeys(PRIMITIVES.values()), ids=lambda f: f.__name__)
def test_a_primitive_is_the_pytorch_it_stands_for(primitive, impl, head, dtype):
    for got, expected, declared in primitive(Rows(backend_of(impl), dtype, head)):
        assert got.dtype == declared
        assert got.shape == expected.shape
        assert relative_error(got, expected) < ALLOWED[declared]


def members() -> dict[str, Any]:
    return {name: member for name, member in vars(Backend).items() if inspect.isfunction(member) and name[0] != "_"}


def test_every_primitive_of_the_protocol_is_tested():
    assert {name for name in members() if name != "__init__"} == set(PRIMITIVES)
    assert set(HEADS) >= {"plain", "all"}


@pytest.mark.parametrize("impl", IMPLS)
def test_both_backends_take_the_arguments_of_the_protocol(impl):
    """By name and in order; the types are mypy's to check."""
    for name, member in members().items():
        declared = list(inspect.signature(member).parameters)[1:]
        taken = inspect.signature(getattr(backend_of(impl), name)).parameters
        assert list(taken)[: len(declared)] == declared, name
        assert all(taken[more].default is not inspect.Parameter.empty for more in list(taken)[len(declared) :]), name
