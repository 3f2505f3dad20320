"""Offsets beyond 2^31 elements, by strides: a tensor of three rows 2^30 elements apart, of which only those exist.

The memory is mapped and never touched between the rows: this takes address space and next to no memory. A 32-bit
offset wraps around to what lies in front of the tensor, which is mapped as well, and reads zeros there.
"""

import mmap

import pytest
import torch
import triton
import triton.language as tl

from npo_kernels.backends.choose import backend_of
from npo_kernels.backends.triton import launch as launches
from npo_kernels.core.lm_head import Head
from tests.kernels import launch
from tests.support import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="lazily committed memory is the CPU's; tests/gpu has large tensors")

STRIDE = 2**30 + 64  # row 2 begins beyond 2^31 elements: row * stride does not fit 32 bits, the stride does
TARGET = torch.tensor([2, 0, 1])
BACKEND = backend_of("triton")


@pytest.fixture
def far():
    """Copies a (3, width) tensor to rows that far apart."""
    mapped = []

    def copy(values, dtype=torch.bfloat16):
        size = (2**31 + 2 * STRIDE + values.shape[1]) * dtype.itemsize
        try:
            mapped.append(mmap.mmap(-1, size))
        except OSError as error:
            pytest.skip(f"cannot map {size / 2**30:.0f} GiB of address space: {error}")
        everything = torch.frombuffer(mapped[-1], dtype=dtype)
        rows = everything.as_strided((3, values.shape[1]), (STRIDE, 1), storage_offset=2**31)
        return rows.copy_(values)

    return copy


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("loop", ["", "flat"])
@pytest.mark.parametrize("which", ["x", "w"])
def test_logits_of_far_rows(far, which, loop, monkeypatch):
    tile = launch.TILE._replace(loop=loop)
    monkeypatch.setattr(launches, "tile_for", lambda _: tile)
    near = {"x": draw(3, 24), "w": draw(3, 24, seed=1)}
    moved = {**near, which: far(near[which])}
    z = [BACKEND.target_logits(case["x"], Head(case["w"]), TARGET) for case in (near, moved)]
    assert torch.equal(*z)
    slabs = [BACKEND.exp_logits(case["x"], Head(case["w"]), TARGET, z[0], (0, 3)) for case in (near, moved)]
    for got, expected in zip(*slabs, strict=True):
        assert torch.equal(got, expected)


def test_a_far_slab(far):
    x, w = draw(3, launch.H).float(), draw(launch.V, launch.H, seed=1).float()
    anchor = BACKEND.target_logits(x, Head(w), TARGET)
    near, moved = launch.Outputs(3), launch.Outputs(3)
    moved.slab = far(torch.zeros(3, launch.V))
    for out in (near, moved):
        launch.exp_logits(out, x, w, TARGET, anchor)
    assert torch.equal(moved.slab, near.slab.bfloat16())


def test_rows_scaled_from_far(far):
    x, scale = draw(3, 20), torch.tensor([0.5, -1.0, 2.0])
    assert torch.equal(BACKEND.scale_rows(far(x), scale), BACKEND.scale_rows(x, scale))


def test_targets_added_from_far_to_far(far):
    x, coef = draw(3, 20), torch.tensor([0.5, -1.0, 2.0])
    near, moved = torch.zeros(3, 20), far(torch.zeros(3, 20), torch.float32)
    for grad, rows in ((near, x), (moved, far(x))):
        BACKEND.add_targets(grad, rows, coef, BACKEND.group_targets(TARGET), (0, 3))
    assert torch.equal(near, moved)


def test_hidden_gradients_with_a_far_weight(far):
    w, product, coef = draw(3, 20), draw(3, 20, seed=1).float(), torch.tensor([0.5, -1.0, 2.0])
    near, moved = torch.zeros(3, 20), torch.zeros(3, 20)
    for out, weight in ((near, w), (moved, far(w))):
        BACKEND.finish_hidden_grad(product, coef, coef, Head(weight), TARGET, torch.tensor([1, 2, 0]), out)
    assert torch.equal(near, moved)


def test_hidden_gradients_at_far_positions(far):
    """The last of more than 2^31 elements of a contiguous gradient; `far` maps as many in front of it."""
    w, product, coef = draw(3, 20), draw(3, 20, seed=1).float(), torch.tensor([0.5, -1.0, 2.0])
    last = 2**31 // 20 + 2
    near, moved = torch.zeros(3, 20), far(torch.zeros(3, 20)).as_strided((last + 1, 20), (20, 1))
    for out, index in ((near, TARGET), (moved, TARGET + last - 2)):
        BACKEND.finish_hidden_grad(product, coef, coef, Head(w), TARGET, index, out)
    assert torch.equal(near.bfloat16(), moved[last - 2 :])


@triton.jit
def _combined(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr):
    at = tl.arange(0, 4)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "sub":
        c = a - b
    else:
        c = a * b
    tl.store(out_ptr + at, c)


@pytest.mark.parametrize(
    ("operation", "fits", "too_large"),
    [("add", 2**31 - 8, 2**31 - 7), ("sub", -(2**31) + 7, -(2**31) + 6), ("mul", 306783378, 306783379)],
)
def test_an_operation_that_leaves_int32_ends_the_launch(operation, fits, too_large):
    """The interpreter checks every one: in all other tests, too."""
    seven, out = torch.full((4,), 7, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    last = torch.tensor([0, 1, 2, fits], dtype=torch.int32)
    _combined[(1,)](last, seven, out, operation)
    assert out[0].item() == {"add": 7, "sub": -7, "mul": 0}[operation]
    last[3] = too_large
    with pytest.raises(Exception, match="int32 overflow"):
        _combined[(1,)](last, seven, out, operation)
