"""impl="torch" in every mode against float64; the choice of the mode; the allocations of a mode."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from npo_kernels.backends.choose import backend_of
from npo_kernels.core import execute, gradients, plan
from npo_kernels.core.matmul import matmul
from tests import matrix, support
from tests.support import IMPLS, TINY, evaluate, make_batch

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "small_blocks")


@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
def test_torch_is_no_worse_than_plain_pytorch(case, plans):
    matrix.check("torch", case, plans)


class Allocations(TorchDispatchMode):
    """The sizes in bytes of the storages that operators create, by address; an address is given out again."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                address, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                self.sizes[address] = max(size, self.sizes.get(address, 0))
        return result


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=support.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=support.name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_logits_never_exist(impl, dtype, needs):
    """100 rows of 500 columns with room for the smallest slice: nothing of half the size of the logits is created."""
    N, V = 100, 500
    leaves = make_batch(dtype, lengths=(N + 2,), prompts=(0,), H=4, V=V).leaves(needs)
    with Allocations() as made:  # the autograd.Function of a user's loss is not an operator: its contents are visible
        support.user_loss(leaves, impl=impl, workspace_mb=TINY).backward()
    slice_bytes = N * backend_of(impl).block_v(leaves.hidden) * backend_of(impl).slab_dtype(leaves.hidden).itemsize
    assert slice_bytes <= max(made.sizes.values()) < N * V * dtype.itemsize / 1.9


@pytest.mark.parametrize(
    ("needs", "workspace_mb"),
    [(("hidden", "weight"), None), (("hidden", "weight"), "chunks"), (("hidden", "weight"), TINY), (("hidden",), TINY)],
    ids=["slab", "chunks", "recompute", "frozen"],
)  # fmt: skip
@pytest.mark.parametrize("impl", IMPLS)
def test_products_take_views_of_the_slab_as_a_vendor_takes_them(impl, needs, workspace_mb, monkeypatch):
    """Nothing is copied: the operands have one stride of 1 and another that is a leading dimension, and half of them
    are the storage that the exponentials were written to, its rows at multiples of 128 bytes: one for the whole call.
    """
    backend, slabs, rooms, operands = backend_of(impl), {}, [], []

    def noting(function):
        def project(*args, **options):
            rooms.append(options["out"])
            result = function(*args, **options)
            slab = result[0] if isinstance(result, tuple) else result
            slabs[slab.untyped_storage().data_ptr()] = slab.stride(0) * slab.itemsize
            return result

        return project

    def product(a, b, out=None, accumulate=True):
        operands.append((a, b))
        return matmul(a, b, out, accumulate)

    for name in ("exp_logits", "exp_logits_at"):
        monkeypatch.setattr(backend, name, noting(getattr(backend, name)))
    for module in (execute, gradients):
        monkeypatch.setattr(module, "matmul", product)
    batch = make_batch(torch.float32, lengths=(19, 12), prompts=(1, 1), H=8, V=300)
    if workspace_mb == "chunks":
        workspace_mb = support.workspace_for(batch, impl, chunks=True)
    evaluate(support.npo, batch, needs, impl=impl, workspace_mb=workspace_mb)
    assert len(operands) >= 2 * len(needs)
    assert len({room.untyped_storage().data_ptr() for room in rooms}) == 1  # held here, so none is the place of another
    assert (len(rooms) > 1) == (workspace_mb is not None)
    for a, b in operands:
        for t in (a, b):
            inner = t.stride().index(1)
            assert t.stride(1 - inner) >= t.shape[inner]
        assert b.is_contiguous() and a.untyped_storage().data_ptr() in slabs
    if impl == "triton":
        assert all(row_bytes % 128 == 0 for row_bytes in slabs.values()) and plan.GRAD_SLICE % 64 == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_more_workspace_never_means_a_dearer_mode(impl, plans):
    order = {"slab": 0, "recompute": 1}
    batch = make_batch()
    found = []
    some, all_rows = (support.workspace_for(batch, impl, chunks) for chunks in (True, False))
    for workspace_mb in (TINY, some, (some + all_rows) / 2, all_rows, 1.0):
        evaluate(support.npo, batch, ("hidden", "weight"), impl=impl, workspace_mb=workspace_mb)
        found.append((order[plans[-1].mode], len(plans[-1].chunks) or len(plans[-1].slices)))
    assert found == sorted(found, reverse=True)
    assert found[0][0] == 1 and found[-1] == (0, 1)
    assert (0, 2) in found or (0, 3) in found
