"""No kernel writes outside of what it was given, or reads what nobody has written, or what lies around an argument of
the caller: every operator, ragged shapes. In the interpreter tests/bounds.py checks each access beside.
"""

import pytest
import torch

from npo_kernels import fused_linear_kl
from tests import support
from tests.canaries import GUARD, Guarded, canaries
from tests.support import DTYPES, IMPLS, LAYOUTS, make_batch, name_of

NEEDS = (("hidden", "weight", "bias"), ("hidden",), ())
WORKSPACES = (None, support.TINY)
OBJECTIVES = support.npo, support.user_loss, support.sequences, support.tokens, support.statistics


def check(impl, dtype, needs, workspace_mb, **shape):
    """Losses and gradients of one call of every operator are finite, and every guard is whole."""
    batch = make_batch(dtype, "all", **shape)
    options = {"impl": impl, "workspace_mb": workspace_mb}
    arguments = Guarded()
    with canaries() as guarded:
        found = [
            arguments.evaluate(objective, batch, needs, **options)
            for objective in (support.npo, support.user_loss, support.sequences, support.statistics)
        ]
        leaves = arguments.leaves(batch, needs)
        tensors = leaves.hidden, leaves.weight, arguments(batch.hidden.flip(0)), arguments(batch.weight)
        kl = fused_linear_kl(*tensors, mask=batch.labels != -100, bias=leaves.bias, **options)
        found.append({"kl": kl.detach()})
        if needs:
            found[-1] |= dict(zip(needs, torch.autograd.grad(kl, [leaves.tensors[n] for n in needs]), strict=True))
        assert guarded
        for results in found:
            assert all(t.isfinite().all() for t in results.values())
    arguments.check()


@pytest.mark.parametrize(("dtype", "workspace_mb"), zip(DTYPES, WORKSPACES, strict=False), ids=name_of)
@pytest.mark.parametrize("needs", NEEDS, ids=name_of)
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_written_outside(impl, dtype, needs, workspace_mb):
    check(impl, dtype, needs, workspace_mb, V=257)  # 128 is a label, and the first column of a slice


SAME = [("torch", 3), ("torch", 16), ("triton", 3)]  # elements between two rows; 3 of them keep no alignment


@pytest.mark.parametrize(("impl", "pad"), SAME, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_of_a_larger_memory_give_the_bits_of_tensors_of_their_own(impl, pad, layout):
    batch, needs = make_batch(torch.bfloat16, "all", layout, H=12, V=70), ("hidden", "weight", "bias")
    arguments = Guarded(pad)
    for objective in OBJECTIVES[:1] if impl == "triton" else OBJECTIVES:
        inside = arguments.evaluate(objective, batch, needs, impl=impl)
        alone = support.evaluate(objective, batch, needs, impl=impl)
        assert all(torch.equal(inside[name], alone[name]) for name in alone)
    arguments.check()


@pytest.mark.parametrize("at", [GUARD - 1, -GUARD], ids=["before", "after"])
def test_an_overwritten_guard_is_noticed(at):
    def one_byte_too_far():
        with canaries(package=__name__.split(".")[0]) as guarded:
            torch.empty(3, 5).zero_()
            assert len(guarded) == 1
            guarded[0][at] = 0

    with pytest.raises(AssertionError, match="1 bytes"):
        one_byte_too_far()
