"""The persistent kernels of KL give the bits of the kernels with a program a split; and when they are not taken."""

import pytest
import torch

from csrc_triton.tiles import PAIR_TILES
from npo_kernels.backends.triton import launch
from npo_kernels.backends.triton import linear_kl as backend
from npo_kernels.core.lm_head import Head
from npo_kernels.core.softmax_stats import Divergence, Lowered, Normalizers, merge_sums
from tests.support import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter's tile")

KERNELS = "softmax_sums_persistent_kernel", "kl_logits_persistent_kernel"
RAGGED = 20, 40, 170  # N, H, V: two row blocks and splits, the last one of two tiles
CASES = [
    (torch.float32, RAGGED, "serial", "all", True), (torch.bfloat16, RAGGED, "flat", "all", True),
    (torch.float32, (1, 8, 5), "flat", "plain", False),
]  # fmt: skip
HEADS = {"plain": (False, 1.0, None), "all": (True, -1.7, 5.0)}


@pytest.fixture
def launched(monkeypatch):
    """(kernel, number of programs) of every persistent launch, in order."""
    found = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(backend, name)

        def __getitem__(self, grid):
            found.append((self.name, *grid))
            return self.kernel[grid]

    for name in KERNELS:
        monkeypatch.setattr(backend, name, Spy(name))
    return found


@pytest.fixture
def force(monkeypatch):
    """A way through the tiles, whatever the table says."""

    def with_loop(loop):
        monkeypatch.setattr(backend, "PAIR_TILES", {key: tile._replace(loop=loop) for key, tile in PAIR_TILES.items()})

    return with_loop


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(N, H, V, dtype, head="plain", ref_H=None):
    """(x, head) of a model and of a reference, and a lowered logit of each row: the first, some, the last."""
    has_bias, *functions = HEADS[head]
    sides = []
    for seed, depth in ((0, H), (3, ref_H or H)):
        x, w = draw(N, depth, seed=seed).to(dtype), (2 * draw(V, depth, seed=seed + 1) / depth**0.5).to(dtype)
        bias = (draw(V, seed=seed + 2) - 9).to(dtype) if has_bias else None
        sides += [x, Head(w, bias, *functions)]
    return sides, Lowered((torch.arange(N) * 41 - 1) % V, 2.5)


def everything(sides, lowered, reverse):
    """Whatever the launches of one call give."""
    x, head, ref_x, ref_head = sides
    model, ref = backend.softmax_sums(x, head, ref_x, None), backend.softmax_sums(ref_x, ref_head, x, lowered)
    vectors = Normalizers(*merge_sums(*model), *merge_sums(*ref)).vectors()
    values = backend.kl_sums(*sides, Divergence(vectors, lowered, reverse))
    divergence = Divergence(vectors, lowered, reverse, values.sum(0))
    V, step = head.weight.shape[0], 128
    slices = [(0, V), *([(step, V)] if step < V else [])]
    return [*model, *ref, values, *(t for part in slices for t in backend.kl_logits(*sides, divergence, part))]


@pytest.mark.parametrize(("dtype", "shape", "loop", "head", "reverse"), CASES, ids=str)
def test_they_give_the_bits_of_the_other_kernels(dtype, shape, loop, head, reverse, force, launched):
    sides, lowered = models(*shape, dtype, head)
    lowered = lowered if reverse else None
    expected = everything(sides, lowered, reverse)
    assert not launched
    force(loop)
    found = everything(sides, lowered, reverse)
    assert [name for name, _ in launched] == [KERNELS[0]] * 2 + [KERNELS[1]] * (3 if shape[2] > 128 else 2)
    assert max(programs for _, programs in launched) <= 3
    assert all(map(torch.equal, found, expected)) and all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("programs", [1, 100])
def test_any_number_of_programs_covers_everything_once(programs, force, launched, monkeypatch):
    sides, lowered = models(*RAGGED, torch.float32)
    expected = everything(sides, lowered, False)
    monkeypatch.setattr(launch, "processors", lambda device: programs)
    force("flat")
    assert all(map(torch.equal, everything(sides, lowered, False), expected))
    assert {count for _, count in launched} == ({1} if programs == 1 else {4, 2})  # row blocks x splits


def test_what_no_descriptor_can_be_made_of_and_another_depth_go_to_the_other_kernels(force, launched):
    for ref_H, names in ((48, {KERNELS[0]}), (41, {KERNELS[0]}), (40, set(KERNELS))):
        sides, lowered = models(4, 40, 9, torch.float32, ref_H=ref_H)
        force("")
        expected = everything(sides, lowered, False)
        force("flat")
        launched.clear()
        assert all(map(torch.equal, everything(sides, lowered, False), expected))
        assert {name for name, _ in launched} == names
        assert len([name for name, _ in launched if name == KERNELS[0]]) == (1 if ref_H == 41 else 2)


def test_columns_beyond_the_vocabulary_are_no_maxima(force):
    """A descriptor reads zeros there, and every logit is below."""
    x, w = draw(20, 40).float().abs(), -draw(70, 40, seed=1).float().abs()
    force("flat")
    maxima, _ = backend.softmax_sums(x, Head(w), x, None)
    z = x @ w.t()
    assert (z < 0).all()
    torch.testing.assert_close(maxima, torch.stack([part.amax(1) for part in z.split(128, dim=1)]))
