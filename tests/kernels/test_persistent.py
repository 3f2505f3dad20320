"""`exp_logits_persistent_kernel` against `exp_logits_kernel` bit for bit, against float64; and when it is not taken."""

from dataclasses import replace

import pytest
import torch

from csrc_triton.tiles import ANY_HIDDEN, TILES
from npo_kernels.backends.choose import backend_of
from npo_kernels.backends.triton import launch as launches
from npo_kernels.backends.triton import moments
from npo_kernels.core.lm_head import Head
from tests import matrix
from tests.kernels import launch
from tests.kernels.launch import TILE, Outputs
from tests.support import DEVICE, DTYPES, HEADS, ON_GPU, persistent_grids, relative_error

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter's tile; tests/gpu has the tiles of GPUs")

BACKEND = backend_of("triton")
LOOPS = ("serial", "flat")  # interpreted, "specialized" is "flat"
# N, H, V: one tile and less; several of everything, ragged; H that block_h divides; a last split of one tile
SHAPES = [(1, 8, 5), (35, 40, 300), (16, 64, 128), (50, 80, 257)]
CASES = [(torch.float32, shape, "flat") for shape in SHAPES[:3]] + [(torch.float32, SHAPES[1], "serial")]
CASES += [(torch.bfloat16, SHAPES[3], "flat"), (torch.float16, SHAPES[1], "flat")]


@pytest.fixture
def launched(monkeypatch):
    """The number of programs of every persistent launch, in order."""
    return persistent_grids(monkeypatch)


@pytest.fixture
def force(monkeypatch):
    """A way through the tiles, whatever the table says."""

    def with_loop(loop):
        tiles = {key: tile._replace(loop=loop) for key, tile in TILES.items()}
        monkeypatch.setattr(launches, "TILES", tiles)

    return with_loop


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(N, H, V, dtype, head="plain"):
    """(x, head, target, anchor), some anchors from the second row block on so low that their rows are repaired."""
    has_bias, logit_scale, softcap = HEADS[head]
    x, w = draw(N, H).to(dtype), (2 * draw(V, H, seed=1) / H**0.5).to(dtype)
    bias = (draw(V, seed=2) - 3).to(dtype) if has_bias else None
    head = Head(w, bias, logit_scale, softcap)
    target = torch.arange(N) * 41 % V
    anchor = BACKEND.target_logits(x, head, target)
    anchor[20::3] -= 100
    return x, head, target, anchor


def same(ours, theirs):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def plainly(x, head, target, anchor, dtype):
    """(N, V) exponentials that are stored, partial sums of those that are summed, in plain PyTorch."""
    z = x.to(dtype) @ head.weight.to(dtype).t()
    z = head.logit_scale * (z if head.bias is None else z + head.bias.to(dtype))
    slope = 1.0
    if head.softcap is not None:
        slope = 1 - torch.tanh(z / head.softcap) ** 2
        z = head.softcap * torch.tanh(z / head.softcap)
    e = torch.exp(z - anchor.to(dtype)[:, None]).scatter(1, target[:, None], 0.0)
    return slope * e, torch.stack([part.sum(1) for part in e.split(TILE.split, dim=1)])


@pytest.mark.parametrize(("dtype", "shape", "loop"), CASES, ids=str)
def test_it_gives_the_bits_of_the_other_kernel(dtype, shape, loop, force, launched):
    case = problem(*shape, dtype, "all")
    V, step = shape[2], BACKEND.block_v(case[0])
    slices = [(0, V), *([(step, V)] if step < V else [])]

    def project():
        stored = [BACKEND.exp_logits(*case, part) for part in slices]
        parts, raised = BACKEND.partial_sums(*case)
        again = torch.full_like(parts, torch.nan)  # but where the row block is done again
        BACKEND.resum(*case[:3], raised, torch.arange(shape[0]) % 32 == 0, again)
        only = [(BACKEND.exp_logits_at(*case, part),) for part in slices]
        return [*stored, *only, (parts, raised, torch.nan_to_num(again, nan=-1.0))]

    expected = project()
    assert not launched
    force(loop)
    found = project()
    assert len(launched) == 3 * len(slices) + 3 and max(launched) <= 3
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "head"), [*((torch.float32, head) for head in HEADS), *((dtype, "all") for dtype in DTYPES[1:])], ids=str
)
def test_it_gives_the_exponentials_and_their_sums(dtype, head, force, launched):
    x, head, target, anchor = problem(35, 40, 300, dtype, head)
    force("flat")
    slab, parts, raised = BACKEND.exp_logits(x, head, target, anchor, (0, 300))
    assert launched and (raised[20::3] > anchor[20::3]).all() and (slab.gather(1, target[:, None]) == 0).all()
    oracle = plainly(x, head, target, raised, torch.float64)
    theirs = plainly(x, head, target, raised, torch.float32)
    for ours, plain, truth in zip((slab, parts), (theirs[0].to(dtype), theirs[1]), oracle, strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + 6e-7
    untouched = parts.clone()
    BACKEND.resum(x, head, target, raised, torch.arange(35) == 20, parts)  # the same anchors: the same sums
    assert torch.equal(parts, untouched)


@pytest.mark.parametrize("programs", [1, 2, 4, 5, 7, 100])
def test_any_number_of_programs_covers_everything_once(programs):
    x, w = draw(50, launch.H).float().to(DEVICE), draw(launch.V, launch.H, seed=1).float().to(DEVICE)
    target = torch.arange(50) * 41 % launch.V
    anchor = torch.zeros(50)
    plain, persistent = Outputs(50), Outputs(50)
    launch.exp_logits(plain, x, w, target, anchor)
    launch.exp_logits(persistent, x, w, target, anchor, tile=TILE._replace(loop="flat"), programs=programs)
    assert persistent.untouched()
    for name in ("slab", "sums", "maxima"):
        assert torch.equal(getattr(persistent, name), getattr(plain, name))


@pytest.mark.parametrize("loop", LOOPS)
def test_columns_beyond_the_vocabulary_are_no_maxima(loop):
    """A descriptor reads zeros there, and every logit is below."""
    x, w = draw(35, launch.H).float().abs(), -draw(launch.V, launch.H, seed=1).float().abs()
    out = Outputs(35)
    launch.exp_logits(out, x, w, torch.zeros(35, dtype=torch.int64), torch.zeros(35), tile=TILE._replace(loop=loop))
    z = x.double() @ w.double().t()
    maxima = torch.stack([part.amax(1) for part in z.split(TILE.split, dim=1)])
    assert (z < 0).all() and relative_error(out.maxima, maxima) < 1e-6


@pytest.mark.parametrize(("before", "row"), [(0, 32), (0, 40), (8, 48), (0, 33), (1, 40)])
@pytest.mark.parametrize("which", ["x", "w"])
def test_rows_that_no_descriptor_can_be_made_of_go_to_the_other_kernel(which, before, row, force, launched):
    """32 columns of rows of `row` elements of 2 bytes, behind `before` others."""
    x, head, target, anchor = problem(35, 32, 130, torch.bfloat16)
    expected = BACKEND.exp_logits(x, head, target, anchor, (0, 130))

    def moved(t):
        return torch.nn.functional.pad(t, (before, row - before - 32))[:, before : before + 32]

    x, head = (moved(x), head) if which == "x" else (x, replace(head, weight=moved(head.weight)))
    force("serial")
    assert same(BACKEND.exp_logits(x, head, target, anchor, (0, 130)), expected)
    assert bool(launched) == (row % 8 == before % 8 == 0)


@pytest.mark.parametrize("case", matrix.cases()[::11], ids=matrix.case_id)
def test_every_mode_with_a_persistent_tile(case, plans, force, launched):
    force("flat")
    matrix.check("triton", case, plans)
    assert launched


@pytest.mark.parametrize(("dtype", "shape", "loop"), CASES, ids=str)
def test_row_moments_have_the_bits_of_the_other_kernel(dtype, shape, loop, monkeypatch):
    x, head, target, _ = problem(*shape, dtype, "all")
    simple = BACKEND.row_moments(x, head, target)
    monkeypatch.setattr(moments, "MOMENT_LOOPS", {("interpreter", 8 * x.itemsize, ANY_HIDDEN): loop})
    kernel, launches_of_it = moments.row_moments_persistent_kernel, []

    class Spy:
        def __getitem__(self, grid):
            launches_of_it.append(grid)
            return kernel[grid]

    monkeypatch.setattr(moments, "row_moments_persistent_kernel", Spy())
    assert same(BACKEND.row_moments(x, head, target), simple)
    assert len(launches_of_it) == (shape[1] * x.itemsize % 16 == 0)
