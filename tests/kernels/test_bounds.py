"""The checks of tests/bounds.py find what they are for; and every kernel was under them, over ragged shapes."""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
import triton
import triton.language as tl

import csrc_triton
from csrc_triton import tiles
from npo_kernels import fused_linear_kl
from npo_kernels.backends.triton import launch, linear_kl, moments
from tests import bounds, support
from tests.bounds import OutOfBoundsError, RaceError
from tests.canaries import Guarded
from tests.support import DEVICE, ON_GPU, make_batch

pytestmark = pytest.mark.skipif(ON_GPU, reason="compiled kernels: compute-sanitizer looks at them (bench certify)")


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, stride_x, first, BLOCK: tl.constexpr):
    """out = x[row] for a row a program, from the element `first` on."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride_x + at, mask=at < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


@triton.jit
def count_kernel(x_ptr, at, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(x_ptr + at, 1.0)
    else:
        tl.store(x_ptr + at, 1.0)


@triton.jit
def pass_on_kernel(x_ptr):
    """Each program writes its own element and reads that of the one before."""
    tl.store(x_ptr + tl.program_id(0) + 1, tl.load(x_ptr + tl.program_id(0)))


def memory():
    """(x (3, 5) in rows of 7, out (3, 8)) of one memory, out directly behind x."""
    everything = torch.zeros(3 * 7 + 3 * 8, device=DEVICE)
    return everything[:21].view(3, 7)[:, :5], everything[21:].view(3, 8)


def test_a_kernel_inside_of_its_arguments_passes():
    x, out = memory()
    copy_kernel[(3,)](x.fill_(2.0), out, 5, 7, 0, BLOCK=8)
    assert (out == torch.tensor([2.0] * 5 + [0.0] * 3)).all() and x.sum() == 30


@pytest.mark.parametrize(
    ("grid", "n", "first", "out", "found"),
    [
        (4, 5, 0, slice(0, 3), r"copy_kernel, program \(3, 0, 0\): load of x_ptr \(3, 5\).*28 bytes past its end"),
        (3, 5, -1, slice(0, 3), r"program \(0, 0, 0\): load of x_ptr.*: 1 of 6 elements .* 4 bytes before its start"),
        (3, 6, 0, slice(0, 3), r"load of x_ptr .* float32 with strides \(7, 1\).* 20 bytes from its start, between"),
        (3, 5, 0, slice(0, 2), r"program \(2, 0, 0\): store of out_ptr \(2, 8\).*: 8 of 8 .* 32 bytes past its end"),
        (1, 5, 0, slice(0, 0), r"store of out_ptr \(0, 8\).*past its end"),
    ],
    ids=["past", "before", "between", "store", "empty"],
)
def test_an_access_outside_says_which(grid, n, first, out, found):
    x, room = memory()
    with pytest.raises(OutOfBoundsError, match=found):
        copy_kernel[(grid,)](x, room[out], n, 7, first, BLOCK=8)


def test_a_write_into_another_argument_is_outside():
    x, out = memory()
    x.fill_(2.0)
    with pytest.raises(OutOfBoundsError, match=r"store of x_ptr.*84 bytes before its start"):
        count_kernel[(1,)](out, -21, ATOMIC=False)
    assert (x == 2.0).all()


@pytest.mark.parametrize("atomic", [False, True])
def test_an_index_too_large(atomic):
    with pytest.raises(OutOfBoundsError, match=f"{'atomic' if atomic else 'store'} of x_ptr .* 4 bytes past"):
        count_kernel[(1,)](torch.zeros(6, device=DEVICE)[1:5], 4, ATOMIC=atomic)


def test_two_programs_at_one_address_are_a_race():
    x = torch.zeros(4, device=DEVICE)
    with bounds.watching_for_races():
        count_kernel[(3,)](x, 1, ATOMIC=True)
        count_kernel[(1,)](x, 1, ATOMIC=False)
        with pytest.raises(RaceError, match=r"count_kernel: store of program 1 at 1 addresses that programs \[0\] "):
            count_kernel[(3,)](x, 1, ATOMIC=False)
        with pytest.raises(RaceError, match=r"pass_on_kernel: load of program 1 .* programs \[0\]"):
            pass_on_kernel[(3,)](x)


# ---------------------------------------------------------------------------------------------------------------------
# Every kernel
# ---------------------------------------------------------------------------------------------------------------------


def kernels() -> set[str]:
    """All that are launched: by their names, which end so."""
    modules = [import_module(f"csrc_triton.{found.name}") for found in iter_modules(csrc_triton.__path__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


# several splits and row blocks, depth and vocabulary not multiples of a tile; and no rows
RAGGED = {"lengths": (3, 1, 0, 19), "prompts": (1, 0, 0, 0), "H": 40, "V": 130}
NO_ROWS = {"lengths": (3, 0), "prompts": (3, 0), "H": 8, "V": 5}


@pytest.mark.parametrize("loop", ["", "flat"])
def test_every_kernel_stays_inside_of_its_arguments_and_its_programs_apart(loop, monkeypatch, tried):
    """The caller's tensors lie between NaN of his. Other tests launch the same kernels with more options."""
    for module, table in ((launch, "TILES"), (linear_kl, "PAIR_TILES")):
        forced = {key: tile._replace(loop=loop) for key, tile in getattr(tiles, table).items()}
        monkeypatch.setattr(module, table, forced)
    loops = {("interpreter", bits, tiles.ANY_HIDDEN): loop for bits in (16, 32)}
    monkeypatch.setattr(moments, "MOMENT_LOOPS", loops if loop else {})
    with bounds.watching_for_races() as launched:
        for shape in (NO_ROWS, RAGGED):
            call_everything(make_batch(torch.bfloat16, "all", **shape).packed(), Guarded(pad=16 if loop else 3))
    found = {one.kernel for one in launched}
    twins = {name for name in kernels() if "persistent" in name}
    assert found >= (twins if loop else kernels() - twins)
    assert found <= kernels()
    tried("launches checked", len(launched))


def call_everything(batch, guarded):
    needs, options = ("hidden", "weight"), {"impl": "triton"}
    for objective in (support.npo, support.tokens, support.statistics):
        guarded.evaluate(objective, batch, needs, **options)
    leaves = guarded.leaves(batch, needs)
    kl = fused_linear_kl(
        leaves.hidden, leaves.weight, guarded(batch.hidden.flip(0)), guarded(batch.weight), bias=leaves.bias,
        ref_bias=leaves.bias, mask=batch.labels != -100, labels=batch.labels.clamp(min=0), target_shift=2.0,
        softcap=4.0, direction="reverse", **options,
    )  # fmt: skip
    torch.autograd.grad(kl, [leaves.hidden, leaves.weight])
    guarded.check()
