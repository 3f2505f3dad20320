"""The mode of a call, and that its pieces cover everything once and stay within the workspace."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npo_kernels import explain, fused_logprob_loss, fused_npo_loss, fused_simnpo_loss, sequence_logprobs
from npo_kernels.core.plan import (
    DEFAULT_WORKSPACE_MB,
    GRAD_SLICE,
    MIB,
    NARROWEST,
    UNIT_VALUES,
    VECTOR_BYTES,
    default_workspace,
    grad_slices,
    make_plan,
    workspace_bytes,
)
from tests import support
from tests.support import TINY, evaluate, make_batch

LLAMA = {"hidden_size": 4096, "vocab_size": 128256, "weight_itemsize": 2, "slab_itemsize": 2, "block_v": 1024}


def plan(lengths=(500, 100, 0, 900), *, known=True, limit=2**40, hidden=True, head=True, in_forward=True, **sizes):
    starts = tuple(torch.tensor((0, *lengths)).cumsum(0).tolist())
    return make_plan(
        num_rows=starts[-1],
        host_starts=starts if known else None,
        need_hidden=hidden,
        need_head=head,
        gradient_in_forward=in_forward,
        limit=limit,
        **{**LLAMA, **sizes},
    )


def test_the_cheapest_mode_that_fits_is_taken():
    assert plan(hidden=False, head=False).mode == "no_grad"
    assert plan(head=False).mode == "frozen"
    assert plan(head=False, in_forward=False).mode == "frozen"
    assert plan().mode == "slab"
    assert plan(hidden=False).mode == "slab"
    assert plan(in_forward=False).mode == "recompute"
    assert plan(limit=1).mode == "recompute"


def test_chunks_hold_as_many_whole_sequences_as_fit():
    whole = plan(hidden_size=64)
    assert whole.chunks == ((0, 4),) and not whole.accumulate
    column, vectors = 4 * (64 + UNIT_VALUES), 1500 * VECTOR_BYTES
    held, row = column * 128256 + vectors, (whole.workspace_bytes - column * GRAD_SLICE - vectors) // 1500
    cut = plan(hidden_size=64, limit=held + 900 * row)
    assert cut.chunks == ((0, 3), (3, 4)) and cut.accumulate
    assert plan(hidden_size=64, limit=held + 900 * row - 1).mode == "recompute"


def test_a_small_head_has_its_gradient_finished_in_as_few_slices_as_fit():
    """By bytes: 128 MiB of float32, which is one slice of GRAD_SLICE columns at H=4096 and all of SmolLM2's head."""
    cuda, smollm2 = torch.device("cuda"), {"hidden_size": 576, "vocab_size": 49152}
    assert [grad_slices(H, cuda) for H in (576, 2048, 4096, 8192)] == [7, 2, 1, 1]
    assert grad_slices(576, torch.device("cpu")) == 1
    one, all_at_once = plan(**smollm2), plan(**smollm2, grad_slices=7)
    assert one.grad_slices == 1 and all_at_once.grad_slices == 6
    column = 4 * (576 + UNIT_VALUES)
    assert all_at_once.workspace_bytes - one.workspace_bytes == column * (49152 - GRAD_SLICE)
    half = plan(**smollm2, grad_slices=7, limit=one.workspace_bytes + 2 * column * GRAD_SLICE + 1, bound=True)
    assert half.grad_slices == 3 and half.workspace_bytes == one.workspace_bytes + 2 * column * GRAD_SLICE
    tight = plan(**smollm2, grad_slices=7, limit=one.workspace_bytes, bound=True)
    assert tight.mode == "slab" and tight.grad_slices == 1  # no dearer mode for the sake of fewer slices


def test_without_lengths_on_the_host_it_is_all_rows_at_once_or_recompute():
    whole = plan()
    assert plan(known=False, limit=whole.workspace_bytes).mode == "slab"
    assert plan(known=False, limit=whole.workspace_bytes - 1).mode == "recompute"


def test_a_loss_that_couples_sequences_is_not_cut_into_chunks():
    limit = plan(hidden_size=64).workspace_bytes - 1
    assert len(plan((50,) * 30, hidden_size=64, limit=limit).chunks) == 2
    assert plan((50,) * 30, hidden_size=64, limit=limit, separable=False).mode == "recompute"


def test_the_workspace_of_the_target_shape_is_what_the_documents_say():
    """8192 rows at H=4096, V=128256: one slab of 2NV bytes in the default workspace, 256 MiB by vocabulary slices."""
    lengths = (512,) * 16
    assert plan(lengths, limit=default_workspace(torch.device("cuda"))).mode == "slab"
    small = plan(lengths, limit=256 * MIB, bound=True)
    assert small.mode == "recompute"
    assert small.workspace_bytes <= 256 * MIB


sizes = st.fixed_dictionaries(
    {
        "hidden_size": st.integers(1, 300),
        "vocab_size": st.integers(1, 20_000),
        "weight_itemsize": st.sampled_from([2, 4]),
        "slab_itemsize": st.sampled_from([2, 4]),
        "block_v": st.sampled_from([64, 128, 8192]),
    }
)


@given(
    st.lists(st.integers(0, 300), max_size=8),
    sizes,
    st.integers(1, 10**8),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_every_plan_covers_everything_once(lengths, sizes, limit, flags):
    hidden, head, in_forward, known = flags
    made = plan(lengths, limit=limit, hidden=hidden, head=head, in_forward=in_forward, known=known, **sizes)
    V, block = sizes["vocab_size"], sizes["block_v"]
    if made.mode == "slab":
        if known:
            assert [first for first, _ in made.chunks] == [0, *(last for _, last in made.chunks[:-1])]
            assert made.chunks[-1][1] == len(lengths)
        else:
            assert len(made.chunks) == 1
        assert made.workspace_bytes <= limit
    edges = [begin for begin, _ in made.slices] + [V]
    assert edges[0] == 0 and [end for _, end in made.slices] == edges[1:]
    unit = min(block, NARROWEST) if made.mode == "recompute" else block
    assert all(begin % unit == 0 for begin in edges[:-1])
    widths = {end - begin for begin, end in made.slices[:-1]}
    assert len(widths) <= 1
    if made.mode in ("frozen", "recompute") and max(widths, default=0) > unit:
        assert made.workspace_bytes <= limit
    assert made.mode in str(made) and made.why in str(made)


def test_the_default_workspace_is_that_of_the_device():
    for device, megabytes in DEFAULT_WORKSPACE_MB.items():
        assert default_workspace(torch.device(device)) == megabytes * MIB
    assert default_workspace(torch.device("meta")) > 0
    assert workspace_bytes(0.5) == MIB // 2 and workspace_bytes(None) is None


def test_a_call_says_at_debug_level_what_it_picked_and_why(caplog):
    with caplog.at_level(logging.DEBUG, logger="npo_kernels"):
        evaluate(support.npo, make_batch(), ("hidden",), impl="torch")
    (record,) = caplog.records
    assert record.name == "npo_kernels"
    assert record.getMessage().startswith("frozen: 1 vocabulary slice(s)")


EXPLAINED = {
    fused_npo_loss: support.npo,
    fused_simnpo_loss: support.simnpo,
    sequence_logprobs: support.sequences,
    fused_logprob_loss: support.user_loss,
}


@pytest.mark.parametrize("needs", [(), ("hidden",), ("weight", "bias")], ids=support.name_of)
@pytest.mark.parametrize("workspace_mb", [None, 0.055, TINY])
@pytest.mark.parametrize("function", EXPLAINED)
def test_explain_gives_the_plan_that_then_runs(function, workspace_mb, needs, plans):
    batch = make_batch(head="bias").leaves(needs)
    expected = batch(_explain(function), workspace_mb=workspace_mb)
    plans.clear()
    EXPLAINED[function](batch, impl="torch", workspace_mb=workspace_mb)
    assert plans[0] == expected


def _explain(function):
    def ask(hidden, weight, labels, **options):
        return explain(function, hidden, weight, labels, impl="torch", **options)

    return ask


def test_explain_knows_that_a_reduction_of_none_is_a_loss_outside():
    batch = make_batch().leaves(("weight",))
    assert batch(_explain(fused_npo_loss)).mode == "slab"
    assert batch(_explain(fused_npo_loss), reduction="none").mode == "recompute"


def test_explain_has_no_plan_of_the_reference_and_refuses_what_the_loss_would():
    batch = make_batch()
    with pytest.raises(ValueError, match="no plan"):
        explain(fused_npo_loss, batch.hidden, batch.weight, batch.labels, impl="reference")
    with pytest.raises(ValueError, match="disagree on H"):
        explain(fused_npo_loss, batch.hidden[..., 1:], batch.weight, batch.labels)
