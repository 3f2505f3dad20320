"""Which tile a call takes: of the row of its GPU the entry of its hidden bucket, or the one for all buckets without."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from csrc_triton.tiles import (
    ANY_HIDDEN,
    HIDDEN_BUCKETS,
    MEASURED,
    MOMENT_LOOPS,
    MOMENT_MEASURED,
    PAIR_MEASURED,
    PAIR_TILES,
    PERSISTENT_CANDIDATES,
    PERSISTENT_PAIR_CANDIDATES,
    TILES,
)
from npo_kernels.backends.tiles import (
    BARRIERS,
    KIB,
    Gpu,
    Row,
    capability,
    choose_row,
    find_entry,
    find_tile,
    hidden_bucket,
    row_of_gpu,
    shared_memory,
)
from tests.aot.cases import PRODUCTS, TARGETS, cases
from tests.aot.compile_all import read_golden

ROOT = Path(__file__).parents[1]
TABLES = TILES, PAIR_TILES
ARCHITECTURES = {target.tiles for target in TARGETS.values()} | {"interpreter"}
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
    for table, candidates, loops in (
        (TILES, PERSISTENT_CANDIDATES, ("serial", "flat", "specialized")),
        (PAIR_TILES, PERSISTENT_PAIR_CANDIDATES, ("serial", "flat")),
    ):
        persistent = [(key, tile) for key, tile in table.items() if tile.loop] + list(candidates.items())
        for (architecture, bits, _), tile in persistent:
            assert architecture in WITH_DESCRIPTORS and bits == 16
            assert tile.loop in loops and (tile.loop != "specialized" or architecture == "sm_100")


def chosen(kind, architecture, bits, hidden_size):
    """What is in force, as a result file names it: the loop of row moments is in the tile of the projection."""
    if kind == "moments":
        loop = find_entry(MOMENT_LOOPS, architecture, bits, hidden_size) or ""
        return find_tile(TILES, architecture, bits, hidden_size)._replace(loop=loop)
    return find_tile(PAIR_TILES if kind == "pairs" else TILES, architecture, bits, hidden_size)


RECORDS = {"sweeps": MEASURED, "pairs": PAIR_MEASURED, "moments": MOMENT_MEASURED}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in RECORDS for key in RECORDS[kind]], ids=str)
def test_what_is_called_measured_is_among_the_finalists_of_a_sweep_on_record(kind, key):
    architecture, bits, bucket = key
    found = json.loads((ROOT / RECORDS[kind][key]).read_text())
    assert 8 * getattr(torch, found["dtype"]).itemsize == bits
    (sweep,) = (s for s in found[kind] if hidden_bucket(s["H"]) == bucket)
    assert sweep["medians"].get(repr(chosen(kind, *key)), math.inf) < 1.02 * min(sweep["medians"].values())


def test_every_entry_of_a_bucket_was_measured():
    assert {key for key in TILES if key[2] != ANY_HIDDEN} <= set(MEASURED)
    assert {key for key, tile in PAIR_TILES.items() if key[2] != ANY_HIDDEN or tile.loop} <= set(PAIR_MEASURED)
    assert set(MOMENT_LOOPS) <= set(MOMENT_MEASURED)


# ---------------------------------------------------------------------------------------------------------------------
# The row of a GPU
# ---------------------------------------------------------------------------------------------------------------------

# architecture, KiB of shared memory that a program may have, row
WITH_A_ROW = [
    ("sm_80", 163, "sm_80"), ("sm_86", 99, "sm_86"), ("sm_89", 99, "sm_86"), ("sm_90", 227, "sm_90"),
    ("sm_100", 227, "sm_100"), ("sm_103", 227, "sm_100"), ("sm_120", 99, "sm_120"), ("sm_121", 99, "sm_120"),
    ("gfx942", 64, "gfx942"),
]  # fmt: skip
WITHOUT_A_ROW = [
    ("sm_70", 96, "sm_86"),  # older than every row
    ("sm_75", 64, "sm_86"),
    ("sm_87", 163, "sm_86"),  # the newest, not the one that fills its shared memory
    ("sm_110", 227, "sm_100"),
    ("sm_110", 99, "sm_86"),  # that of sm_100 does not fit, those of sm_90 and sm_80 neither
    ("sm_110", 192, "sm_86"),  # as much as the operands of sm_100 and sm_90: no room for the barriers
    ("sm_130", 227, "sm_120"),
    ("sm_130", 64, "sm_86"),  # none fits
    ("gfx90a", 64, "gfx942"),
    ("gfx950", 160, "gfx942"),
    ("gfx1100", 64, "gfx942"),
]
UNKNOWN = Gpu("NVIDIA T4", "sm_75", 64 * KIB)
NOTE = "no row for 'NVIDIA T4' (capability 7.5, 64 KiB of shared memory)"


@pytest.mark.parametrize(("architecture", "kib", "row"), WITH_A_ROW)
def test_a_gpu_that_has_a_row_takes_it(architecture, kib, row):
    assert choose_row(Gpu("a GPU", architecture, kib * KIB), TABLES) == Row(row, row)


@pytest.mark.parametrize(("architecture", "kib", "row"), WITHOUT_A_ROW)
def test_a_gpu_without_a_row_takes_the_newest_that_fits(architecture, kib, row):
    chosen = choose_row(Gpu("a GPU", architecture, kib * KIB), TABLES)
    assert (chosen.architecture, chosen.own) == (row, architecture) and chosen.note and chosen.warning


def test_what_aot_compiles_a_target_with_is_what_a_gpu_of_it_takes():
    for name, target in TARGETS.items():
        assert choose_row(Gpu(name, name, target.program_shared), TABLES).architecture == target.tiles


def test_a_row_of_its_own_is_taken_once_it_is_in_every_table():
    rows = [{("sm_75", *key[1:]): tile for key, tile in table.items() if key[0] == "sm_86"} for table in TABLES]
    first, second = (table | row for table, row in zip(TABLES, rows, strict=True))
    assert choose_row(UNKNOWN, (first, PAIR_TILES)).architecture == "sm_86"
    assert choose_row(UNKNOWN, (first, second)) == Row("sm_75", "sm_75")


def test_the_sentence_names_the_gpu_its_tiles_and_what_to_do():
    row = choose_row(UNKNOWN, TABLES)
    assert row.note == NOTE
    assert NOTE in row.warning and "tiles of sm_86, which need the least" in row.warning
    assert "`python -m bench tune`" in row.warning
    assert "the newest that" in choose_row(Gpu("NVIDIA Thor", "sm_110", 227 * KIB), TABLES).warning
    assert "the newest that" in choose_row(Gpu("AMD Radeon RX 7900", "gfx1100", 64 * KIB), TABLES).warning
    assert "(gfx90a, 64 KiB of" in choose_row(Gpu("AMD Instinct MI250X", "gfx90a", 64 * KIB), TABLES).note


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("sm_75", (7, 5)), ("sm_103", (10, 3)), ("gfx90a", (9, 0)), ("gfx942", (9, 4)), ("gfx1201", (12, 0))],
)
def test_the_capability_is_in_the_name(architecture, expected):
    assert capability(architecture) == expected


def test_no_product_takes_more_shared_memory_than_was_counted():
    """Against what the compilers took, barriers of asynchronous loads left out."""
    recorded = read_golden()["cases"]
    products = [case for target in TARGETS for case in cases(target, everything=True) if case.kernel in PRODUCTS]
    found = [case for case in products if case.name in recorded]
    assert len(found) > 100
    for case in found:
        models = 2 if case.kernel == "kl_logits_persistent_kernel" else 1
        assert recorded[case.name]["shared"] <= shared_memory(case.tile, case.bits // 8, models) + BARRIERS, case.name


# ---------------------------------------------------------------------------------------------------------------------
# The backend
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend():
    pytest.importorskip("triton")
    from npo_kernels.backends.triton import launch

    row_of_gpu.cache_clear()
    yield launch
    row_of_gpu.cache_clear()


T4 = {"name": "NVIDIA T4", "major": 7, "minor": 5, "shared_memory_per_block": 48 * KIB,
      "shared_memory_per_block_optin": 64 * KIB, "gcnArchName": "NVIDIA T4"}  # fmt: skip
H100 = T4 | {"name": "NVIDIA H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 227 * KIB}
MI300 = {"name": "AMD Instinct MI300X", "major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-"}
MI250 = MI300 | {"name": "AMD Instinct MI250X", "minor": 0, "gcnArchName": "gfx90a:sramecc+:xnack-"}


def pretend(monkeypatch, properties):
    """PyTorch finds such a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", "7.0" if properties["gcnArchName"].startswith("gfx") else None)


@pytest.mark.parametrize(("properties", "row"), [(H100, "sm_90"), (MI300, "gfx942")], ids=["sm_90", "gfx942"])
def test_the_backend_knows_a_gpu_and_says_nothing(properties, row, backend, monkeypatch):
    pretend(monkeypatch, properties)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.architecture(torch.device("cuda", 0)) == row


@pytest.mark.parametrize(("properties", "row"), [(T4, "sm_86"), (MI250, "gfx942")], ids=["sm_75", "gfx90a"])
def test_the_backend_warns_once_of_a_gpu_without_a_row(properties, row, backend, monkeypatch):
    pretend(monkeypatch, properties)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for device in ("cuda", "cuda:0", "cuda"):
            assert backend.architecture(torch.device(device)) == row
        assert len(said) == 1 and properties["name"] in str(said[0].message)
        assert "64 KiB of shared memory" in str(said[0].message)
        assert backend.architecture(torch.device("cuda:1")) == row and len(said) == 2


@pytest.mark.parametrize(
    ("H", "itemsize", "kernel", "block_h", "measured"),
    [(576, 2, "simple", 64, True), (2048, 2, "simple", 64, True), (4096, 2, "persistent", 64, True),
     (4095, 2, "simple", 64, True), (8192, 2, "simple", 64, False), (4096, 4, "simple", 32, False)],
)  # fmt: skip
def test_the_backend_says_which_kernel_a_call_takes_and_whether_that_was_measured(
    H, itemsize, kernel, block_h, measured, backend, monkeypatch
):
    pretend(monkeypatch, H100)
    said = backend.describe(SimpleNamespace(device=torch.device("cuda", 0), itemsize=itemsize, shape=(1, H)))
    n, v = (128, 256) if itemsize == 2 else (64, 128)
    ending = "measured" if measured else "not measured on this GPU"
    assert said == f"{kernel} kernel, tile {n}x{v}x{block_h} of row sm_90, {ending}"


def test_the_backend_says_that_the_row_is_of_another_gpu(backend, monkeypatch):
    assert backend.describe(torch.empty(1, 64)) == "interpreter"
    pretend(monkeypatch, T4)
    x = SimpleNamespace(device=torch.device("cuda", 0), itemsize=2, shape=(1, 64))
    monkeypatch.setitem(backend.MEASURED, ("sm_86", 16, 1024), "of a GPU that has the row")
    with pytest.warns(UserWarning, match="NVIDIA T4"):
        said = backend.describe(x)
    assert said == f"simple kernel, tile 128x128x32 of row sm_86, not measured on this GPU: {NOTE}"


def test_the_backend_looks_its_operands_up(backend, monkeypatch):
    if not backend.INTERPRETED:
        pytest.skip("the interpreter's entries")
    x = torch.empty(3, 1500)
    common = backend.tile_for(x)
    special = common._replace(split_tiles=5)
    monkeypatch.setitem(backend.TILES, ("interpreter", 32, 2048), special)
    assert backend.tile_for(x) == special and backend.block_v(x) == special.split
    for other in (x[:, :1024], torch.empty(3, 2049), x.bfloat16()):
        assert backend.tile_for(other) == common
