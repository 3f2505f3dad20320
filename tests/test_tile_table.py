"""Which tile a call takes: the entry of its hidden bucket, or the one for all buckets without an entry."""

import pytest
import torch

from csrc_triton.tiles import ANY_HIDDEN, HIDDEN_BUCKETS, PAIR_TILES, PERSISTENT_CANDIDATES, TILES
from npo_kernels.backends.tiles import find_tile, hidden_bucket

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")
WITH_DESCRIPTORS = ("sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("hidden_size", "bucket"),
    [(1, 1024), (576, 1024), (1024, 1024), (1025, 2048), (2048, 2048), (3584, 4096), (4096, 4096), (4097, 8192),
     (8192, 8192), (16384, 8192)],
)  # fmt: skip
def test_a_hidden_size_belongs_to_the_next_bucket_or_the_last(hidden_size, bucket):
    assert hidden_bucket(hidden_size) == bucket


def test_an_entry_of_the_bucket_wins_there_and_nowhere_else():
    table = {("sm_90", 16, ANY_HIDDEN): "any", ("sm_90", 16, 4096): "deep", ("sm_90", 32, ANY_HIDDEN): "wide"}
    found = [find_tile(table, "sm_90", 16, H) for H in (576, 2048, 2049, 4096, 5120)]
    assert found == ["any", "any", "deep", "deep", "any"]
    assert find_tile(table, "sm_90", 32, 4096) == "wide"
    with pytest.raises(KeyError):
        find_tile(table, "sm_80", 16, 4096)


@pytest.mark.parametrize("table", [TILES, PAIR_TILES], ids=["exp_logits", "kl_logits"])
def test_the_table_has_every_architecture_and_only_known_buckets(table):
    assert {key[:2] for key in table if key[2] == ANY_HIDDEN} == {(a, bits) for a in ARCHITECTURES for bits in (16, 32)}
    assert {bucket for *_, bucket in table} <= {ANY_HIDDEN, *HIDDEN_BUCKETS}
    assert sorted(HIDDEN_BUCKETS) == list(HIDDEN_BUCKETS)


def test_a_persistent_tile_is_for_hardware_that_has_descriptors():
    persistent = {key: tile for key, tile in TILES.items() if tile.loop} | PERSISTENT_CANDIDATES
    for (architecture, bits, _), tile in persistent.items():
        assert architecture in WITH_DESCRIPTORS and bits == 16
        assert tile.loop in ("serial", "flat") or (tile.loop, architecture) == ("specialized", "sm_100")
    assert not any(tile.loop for tile in PAIR_TILES.values())


def test_the_backend_looks_its_operands_up(monkeypatch):
    pytest.importorskip("triton")
    from npo_kernels.backends import triton as triton_backend

    if not triton_backend.INTERPRETED:
        pytest.skip("the interpreter's entries")
    x = torch.empty(3, 1500)
    common = triton_backend.tile_for(x)
    special = common._replace(split_tiles=5)
    monkeypatch.setitem(triton_backend.TILES, ("interpreter", 32, 2048), special)
    assert triton_backend.tile_for(x) == special and triton_backend.block_v(x) == special.split
    for other in (x[:, :1024], torch.empty(3, 2049), x.bfloat16()):
        assert triton_backend.tile_for(other) == common
