"""The kernels of `exp_logits` and `row_statistics` launched by hand: every flag, nothing beside."""

import itertools

import pytest
import torch
import triton

from csrc_triton.row_statistics import reanchor_kernel, row_statistics_kernel
from tests.kernels import launch
from tests.kernels.launch import SENTINEL, SPLITS, TILE, H, Outputs, V
from tests.support import DEVICE, relative_error

N = 35  # three row blocks, the last of three rows, in groups of two
ROW_BLOCKS = triton.cdiv(N, TILE.block_n)
LOOPS = ("", "serial", "flat")  # one program a split, and persistent ones


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


@pytest.fixture
def problem():
    """(x, w, target, anchor, exact logits, exact exponentials)."""
    x, w = draw(N, H), draw(V, H, seed=1, scale=H**-0.5)
    target = (torch.arange(N) * 41 % V).to(DEVICE)
    target[0], target[1] = V - 1, 0
    z = x.double() @ w.double().t()
    anchor = z.gather(1, target[:, None]).squeeze(1).float()
    e = torch.exp(z - anchor.double()[:, None]).scatter(1, target[:, None], 0.0)
    return x, w, target, anchor, z, e


def by_split(values, reduce):
    return torch.stack([reduce(part) for part in values.split(TILE.split, dim=1)])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("store", "sums", "maxima"), list(itertools.product([False, True], repeat=3)))
def test_each_flag_writes_its_output_and_nothing_else(problem, store, sums, maxima, loop):
    x, w, target, anchor, z, e = problem
    out = Outputs(N)
    tile = TILE._replace(loop=loop)
    launch.exp_logits(out, x, w, target, anchor, store=store, sums=sums, maxima=maxima, tile=tile)
    assert out.untouched(store, sums, maxima)
    if store:
        assert relative_error(out.slab, e) < 1e-6
        assert (out.slab.gather(1, target[:, None]) == 0).all()
    if sums:
        assert relative_error(out.sums, by_split(e, lambda part: part.sum(1))) < 1e-6
    if maxima:
        assert relative_error(out.maxima, by_split(z, lambda part: part.amax(1))) < 1e-6


@pytest.mark.parametrize("loop", LOOPS)
def test_a_repair_does_the_dirty_row_blocks_again_and_returns_from_the_others(problem, loop):
    x, w, target, anchor, _, e = problem
    out = Outputs(N)
    dirty = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    launch.exp_logits(out, x, w, target, anchor, dirty=dirty, maxima=False, tile=TILE._replace(loop=loop))
    redone = slice(TILE.block_n, 2 * TILE.block_n)
    assert relative_error(out.slab[redone], e[redone]) < 1e-6
    assert relative_error(out.sums[:, redone], by_split(e[redone], lambda part: part.sum(1))) < 1e-6
    for rest in (slice(0, TILE.block_n), slice(2 * TILE.block_n, N)):
        assert (out.slab[rest] == SENTINEL).all() and (out.sums[:, rest] == SENTINEL).all()
    assert out.untouched(maxima=False)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("begin", [0, 128, 256])
def test_targets_count_from_the_beginning_of_the_vocabulary(problem, begin, loop):
    """Of a slice that begins later, exactly the labels inside it have a zero column."""
    x, w, target, anchor, *_ = problem
    out = Outputs(N)
    launch.exp_logits(out, x, w, target, anchor, begin=begin, tile=TILE._replace(loop=loop))
    zero = (out.slab == 0).nonzero().tolist()
    expected = [[i, y - begin] for i, y in enumerate(target.tolist()) if begin <= y < begin + V]
    assert zero == expected


def reanchor(maxima, anchor, headroom):
    raised = torch.full((N + 10,), SENTINEL, device=DEVICE)
    dirty = torch.full((ROW_BLOCKS + 1,), 77, dtype=torch.int32, device=DEVICE)
    reanchor_kernel[(ROW_BLOCKS,)](maxima, anchor, raised, dirty, N, maxima.shape[0], headroom, BLOCK_N=TILE.block_n)
    assert (raised[N:] == SENTINEL).all() and dirty[ROW_BLOCKS] == 77
    return raised[:N], dirty[:ROW_BLOCKS]


@pytest.mark.parametrize("split", range(SPLITS))
def test_reanchor_finds_the_maximum_in_any_split(split):
    anchor = draw(N)
    maxima = (anchor - 1).repeat(SPLITS, 1)
    maxima[split, N - 1] = anchor[N - 1] + 55.0
    raised, dirty = reanchor(maxima, anchor, 40.0)
    assert dirty.tolist() == [0, 0, 1]
    assert torch.equal(raised[:-1], anchor[:-1])
    assert raised[-1] == maxima[split, N - 1] - 40.0


def test_reanchor_leaves_what_is_within_the_headroom_and_nan():
    anchor = torch.zeros(N, device=DEVICE)
    anchor[20] = torch.nan
    maxima = torch.full((SPLITS, N), 40.0, device=DEVICE)
    raised, dirty = reanchor(maxima, anchor, 40.0)
    assert dirty.tolist() == [0, 0, 0]
    assert raised.isnan().nonzero().flatten().tolist() == [20]
    raised, dirty = reanchor(maxima + 1, anchor, 40.0)
    assert dirty.tolist() == [1, 1, 1]
    assert raised.isnan().sum() == 1 and raised.nansum() == N - 1


def test_row_statistics_take_every_split_once():
    parts, zero = draw(5, N).abs(), torch.zeros(N, device=DEVICE)
    outputs = torch.full((3, N + 4), SENTINEL, device=DEVICE)
    row_statistics_kernel[(2,)](parts, zero, zero, *outputs, N, 5, BLOCK_N=32)
    sums = parts.double().sum(0)
    for out, expected in zip(outputs, (-sums.log1p(), sums / (1 + sums), 1 / (1 + sums)), strict=True):
        assert relative_error(out[:N], expected) < 1e-6
        assert (out[N:] == SENTINEL).all()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_row_blocks_in_groups_of_any_size_cover_every_split(problem, group, loop):
    """The order of the programs is for the caches alone: it may lose or repeat no block."""
    x, w, target, anchor, _, e = problem
    out = Outputs(N)
    launch.exp_logits(out, x, w, target, anchor, tile=TILE._replace(group=group, loop=loop))
    assert relative_error(out.slab, e) < 1e-6
    assert relative_error(out.sums, by_split(e, lambda part: part.sum(1))) < 1e-6
