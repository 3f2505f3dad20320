"""The shift rule and the compaction of rows, against a loop that anybody can check."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_kernels import fused_npo_loss, sequence_logprobs
from npo_kernels.backends.choose import backend_of
from npo_kernels.core import value_checks
from npo_kernels.core.layout import PADDING_ROW, flatten
from tests.canaries import canaries
from tests.support import DEVICE, IMPLS

IGNORE = -100
V = 10


def flat_targets(labels, cu_seqlens=None, shift=True):
    positions = flatten(labels, cu_seqlens, shift, IGNORE)
    return positions.targets.tolist(), positions.offsets.tolist()


def test_a_padded_position_is_scored_on_the_next_label_and_the_last_on_nothing():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert flat_targets(labels) == ([2, 3, IGNORE, 5, 6, IGNORE], [0, 3, 6])
    assert flat_targets(labels, shift=False) == ([1, 2, 3, 4, 5, 6], [0, 3, 6])


def test_no_pair_crosses_a_packed_boundary_even_where_the_first_label_is_in_place():
    labels, cu_seqlens = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2, 2, 5, 6, 6], dtype=torch.int32)
    assert flat_targets(labels, cu_seqlens) == ([2, IGNORE, 4, 5, IGNORE, IGNORE], [0, 2, 2, 5, 6, 6])
    assert flat_targets(labels, cu_seqlens, shift=False) == ([1, 2, 3, 4, 5, 6], [0, 2, 2, 5, 6, 6])


@pytest.mark.parametrize("shift", [True, False])
def test_batches_of_nothing_are_flat_batches_of_nothing(shift):
    for shape in ((0, 4), (3, 0), (0, 0)):
        targets, offsets = flat_targets(torch.zeros(shape, dtype=torch.int64), shift=shift)
        assert targets == []
        assert offsets == [0] * (shape[0] + 1)
    assert flat_targets(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]), shift) == ([], [0, 0])
    assert flat_targets(torch.zeros(0, dtype=torch.int64), torch.tensor([0]), shift) == ([], [0])


batches = st.lists(st.lists(st.sampled_from([IGNORE, IGNORE, 0, 3, V - 1]), max_size=6), max_size=5)


@given(batches, st.booleans())
def test_packed_targets_are_the_padded_ones_without_the_padding(batch, shift):
    length = max(map(len, batch), default=0)
    padded = torch.tensor([seq + [IGNORE] * (length - len(seq)) for seq in batch], dtype=torch.int64)
    packed = torch.tensor([label for seq in batch for label in seq], dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *map(len, batch)]).cumsum(0)
    padded_targets, _ = flat_targets(padded.view(len(batch), length), shift=shift)
    targets, offsets = flat_targets(packed, cu_seqlens, shift)
    expected = []
    for s, seq in enumerate(batch):
        expected += padded_targets[s * length : s * length + len(seq)]
    assert targets == expected
    assert offsets == cu_seqlens.tolist()


def compacted(impl, batch, num_rows=None):
    cu_seqlens = torch.tensor([0, *map(len, batch)]).cumsum(0).int().to(DEVICE)
    labels = torch.tensor([label for seq in batch for label in seq], dtype=torch.int64, device=DEVICE)
    return backend_of(impl).compact(labels, cu_seqlens, False, V, IGNORE, num_rows)


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """The kernels in blocks that these batches have several of."""
    if request.param == "triton":
        monkeypatch.setattr("npo_kernels.backends.triton.compaction.BLOCK_POSITIONS", 4)
    return request.param


@given(batches, st.none() | st.integers(0, 5))
def test_rows_are_the_scored_positions_in_order(batch, extra):
    index, target, sequence, starts = [], [], [], [0]
    position = 0
    for s, seq in enumerate(batch):
        for label in seq:
            if label != IGNORE:
                index.append(position)
                target.append(label)
                sequence.append(s)
            position += 1
        starts.append(len(index))
    rows = compacted("torch", batch, None if extra is None else len(index) + extra)
    scored, filling = slice(len(index)), slice(len(index), None)
    assert rows.index[scored].tolist() == index
    assert rows.target[scored].tolist() == target
    assert rows.sequence[scored].tolist() == sequence
    assert rows.starts.tolist() == starts
    assert rows.num_tokens.tolist() == torch.tensor(starts).diff().tolist()
    assert rows.host_starts == (tuple(starts) if extra is None else None)
    filled = min(extra or 0, position - len(index))  # never more rows than there are positions
    assert rows.target[filling].tolist() == [PADDING_ROW] * filled
    assert rows.sequence[filling].tolist() == [len(batch)] * filled
    assert (rows.index[filling] < max(1, position)).all()


@pytest.mark.parametrize("label", [-1, V, V + 5, 2**40])
def test_a_label_outside_the_vocabulary_poisons_its_row(impl, label):
    assert compacted(impl, [[1, label], [2]]).target.tolist() == [1, V, 2]


def test_too_few_rows_poison_all_of_them(impl):
    rows = compacted(impl, [[1, 2, IGNORE], [3]], num_rows=2)
    assert rows.target.tolist() == [V, V]
    assert rows.starts.tolist() == [0, 2, 2]


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 5], [0, 3, 2, 4], [0, -1, 4]])
def test_broken_offsets_poison_every_row_and_read_nothing_outside(impl, offsets):
    surrounded = torch.full((20,), 2**40, device=DEVICE)
    surrounded[8:12] = torch.tensor([1, 2, 3, 4])
    for shift in (False, True):
        cu_seqlens = torch.tensor(offsets, device=DEVICE)
        rows = backend_of(impl).compact(surrounded[8:12], cu_seqlens, shift, V, IGNORE, num_rows=4)
        scored = rows.target[rows.target != PADDING_ROW].tolist()
        assert scored and set(scored) == {V}
        assert shift or len(scored) == 4


@pytest.mark.parametrize("offsets", [[3, 5, 18], [0, 18, 5], [0, 5, 9], [5], [0, -1, 18]])
def test_losses_of_broken_offsets_are_nan_and_stay_within_their_rows(impl, offsets, monkeypatch):
    monkeypatch.setattr(value_checks, "readable", lambda tensor: False)  # as on a GPU
    hidden = torch.randn(18, 8, device=DEVICE, requires_grad=True)
    weight, labels = torch.randn(40, 8, device=DEVICE), torch.arange(18, device=DEVICE)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens": cu_seqlens, "shift": False, "impl": impl}
    ref_logps = torch.zeros(len(offsets) - 1, device=DEVICE)
    for num_rows in (None, 18):
        with canaries():
            loss = fused_npo_loss(hidden, weight, labels, ref_logps=ref_logps, num_rows=num_rows, **options)
            logps, _ = sequence_logprobs(hidden, weight, labels, num_rows=num_rows, **options)
            (loss + logps.sum()).backward()
        assert len(offsets) == 1 or (loss.isnan() and logps.isnan().any())


shapes = st.tuples(st.integers(0, 5), st.integers(0, 9))


@pytest.mark.parametrize("shift", [True, False])
@settings(max_examples=10)
@given(shapes, st.lists(st.integers(0, 12), max_size=6), st.none() | st.integers(0, 30), st.randoms())
def test_both_backends_find_the_same_rows(shift, shape, cuts, num_rows, random):
    """Padded and packed, of any lengths, with room for all rows or not."""
    pytest.importorskip("triton")
    labels = torch.tensor([random.choice([IGNORE, 0, 3, V - 1, V, -5]) for _ in range(shape[0] * shape[1])])
    labels = labels.long().to(DEVICE)
    ends = sorted(min(cut, len(labels)) for cut in cuts)
    cu_seqlens = torch.tensor([0, *ends, len(labels)], dtype=torch.int32, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npo_kernels.backends.triton.compaction.BLOCK_POSITIONS", 4)
        for batch in ((labels.view(shape), None), (labels, cu_seqlens)):
            expected, found = (
                vars(backend_of(impl).compact(*batch, shift, V, IGNORE, num_rows)) for impl in ("torch", "triton")
            )
            for name, value in expected.items():
                assert (found[name] == value) if name == "host_starts" else torch.equal(found[name], value), name
