"""Hugging Face models under DDP and FSDP2: two gloo ranks have the gradients of one process on the whole batch."""

import pytest
import torch.multiprocessing as mp

pytest.importorskip("transformers", reason="the hf extra is not installed")

from tests.distributed.wrapped import CASES, WORLD, expected_gradients, rank_main


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """All cases in one pair of processes: starting them costs more than running."""
    expected = {case: expected_gradients(case) for case in CASES}
    with mp.Manager() as manager:
        found = manager.list()
        store = (tmp_path_factory.mktemp("ranks") / "store").as_uri()
        mp.spawn(rank_main, (store, expected, found), nprocs=WORLD)
        return list(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "promises"])
def test_two_ranks_have_the_gradients_of_one_process(case, failures):
    assert [failure for failure in failures if failure.startswith(f"{case}, rank")] == []
