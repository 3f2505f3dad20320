"""What measuring one kernel or another rests on: forced tiles, tiles near others, counted work, bounded time."""

import argparse
import math

import pytest
import torch

from bench import measure, tune, variants
from bench.cases import HEADS, even
from bench.certify.stages import roofline
from bench.measure import interleaved
from bench.memory import peak_of
from bench.options import Options
from bench.providers import PROVIDERS, Provider, UnsupportedError
from bench.providers.kernels import KERNELS, forced, persistent, simple
from bench.records import RESULTS, latest, read_all, record, summary
from bench.suites import scaling
from bench.sweeps import Times, take_turns
from bench.timeline import Span, Timeline, timeline
from csrc_triton.tiles import (
    ANY_HIDDEN,
    PAIR_TILES,
    PERSISTENT_CANDIDATES,
    PERSISTENT_PAIR_CANDIDATES,
    TILES,
    Tile,
)
from npo_kernels.backends.tiles import Row

X = torch.empty(3, 8192, dtype=torch.bfloat16)  # a hidden size without an entry of its own


def test_a_kernel_is_forced_for_as_long_as_it_is_wanted():
    backend = pytest.importorskip("npo_kernels.backends.triton.launch")
    before, other = backend.tile_for(X), Tile(16, 32, 32, 4, 4, 1)
    with forced(lambda architecture, x: other):
        assert backend.tile_for(X) is other and backend.block_v(X) == 128
    assert backend.tile_for(X) == before


def test_the_candidates_are_the_simple_kernel_and_the_persistent_one(monkeypatch):
    key = ("sm_90", 16, ANY_HIDDEN)
    assert not simple("sm_90", X).loop and persistent("sm_90", X) == PERSISTENT_CANDIDATES[key]
    monkeypatch.setitem(TILES, key, TILES[key]._replace(loop="serial"))
    assert simple("sm_90", X) == TILES[key]._replace(loop="") and persistent("sm_90", X) == TILES[key]
    with pytest.raises(UnsupportedError, match="no persistent tile for 32 bits on sm_90"):
        persistent("sm_90", X.float())


@pytest.mark.parametrize("name", KERNELS)
def test_forward_and_backward_run_in_the_kernel_of_the_provider(name, monkeypatch):
    backend, taken = pytest.importorskip("npo_kernels.backends.triton.exp_logits"), []
    monkeypatch.setitem(PERSISTENT_CANDIDATES, ("interpreter", 32, ANY_HIDDEN), Tile(16, 64, 32, 2, 4, 1, loop="flat"))
    launch = backend.launch_exp_logits

    def spy(x, *rest, **options):
        taken.append(backend.launch.tile_for(x).loop)
        return launch(x, *rest, **options)

    monkeypatch.setattr(backend, "launch_exp_logits", spy)
    batch = even("even", HEADS["toy"], N=6, B=2).batch(torch.float32, "cpu")
    PROVIDERS[f"npo_kernels/triton/{name}"].step(batch)
    assert taken and set(taken) == {"flat" if name == "persistent" else ""}


def test_a_first_sweep_is_of_tiles_that_differ_in_one_thing():
    key = ("sm_90", 16, ANY_HIDDEN)
    found = tune.neighbours("sm_90", 16, 8192)
    assert 10 < len(found) == len(set(found)) < 30 and found[:2] == [TILES[key], PERSISTENT_CANDIDATES[key]]
    for tile in found:
        differing = [
            sum(a != b for name, a, b in zip(Tile._fields, tile, centre, strict=True) if name != "split_tiles")
            for centre in (TILES[key], PERSISTENT_CANDIDATES[key])
        ]
        assert min(differing) <= 1 and tile.split == tune.SPLIT


def test_a_sweep_enters_nothing_in_the_row_of_another_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "row_of", lambda device: Row("sm_86", "sm_75", "no row for 'NVIDIA T4'", "it has none"))
    assert tune.main(argparse.Namespace(H=[4096], dtype="bfloat16", write=True)) == 2
    assert "copy the lines of 'sm_86'" in capsys.readouterr().err
    present, best = TILES["sm_86", 32, ANY_HIDDEN], Tile(16, 32, 32, 4, 4, 1)
    monkeypatch.setattr(tune, "sweep", lambda *_: Times({}, {best: 1.0, present: 2.0}, 1))
    found = tune.sweep_hidden("sm_86", 4096, [best], (torch.empty(1, 4096),) * 3, 1, "sm_75")
    assert found["suggestion"].startswith('("sm_75", 32, 4096): Tile(16, 32,')


def test_persistent_kernels_are_compared_where_there_are_descriptors():
    key = ("sm_90", 16, ANY_HIDDEN)
    candidate, present = PERSISTENT_PAIR_CANDIDATES[key], TILES[key]
    found = variants.pair_tiles("sm_90", 16, 8192)
    assert found[0] == PAIR_TILES[key] and candidate in found and {t.loop for t in found} == {"", "serial", "flat"}
    found = variants.moment_tiles("sm_90", 16, 8192, present._replace(loop="serial"))
    assert found == [present._replace(loop=loop) for loop in ("", "serial", "flat")]
    for architecture, bits, H in (("sm_80", 16, 8192), ("sm_90", 32, 8192), ("sm_90", 16, 8191)):
        assert len(variants.pair_tiles(architecture, bits, H)) == 1
        assert len(variants.moment_tiles(architecture, bits, H, present)) == 1


@pytest.mark.parametrize(
    ("runs", "module", "kernels"),
    [(variants.pair_runs, "linear_kl", ("softmax_sums", "kl_logits", "kl_logits")),
     (variants.moment_runs, "moments", ("row_moments",))],
)  # fmt: skip
def test_what_is_timed_is_the_kernel_of_the_tile(runs, module, kernels, monkeypatch):
    """Each loop is a kernel of its own, in the tile that was asked for."""
    backend, launched = pytest.importorskip(f"npo_kernels.backends.triton.{module}"), []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(backend, name)

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                launched.append((self.name, constants["BLOCK_N"], constants.get("FLATTEN")))
                self.kernel[grid](*arguments, **constants)

            return launch

    for name in {f"{kernel}{kind}_kernel" for kernel in kernels for kind in ("", "_persistent")}:
        monkeypatch.setattr(backend, name, Spy(name))
    tiles = [Tile(32, 32, 32, 2, 4, 1, loop=loop) for loop in ("", "serial", "flat")]
    prepared = runs(tiles, even("even", HEADS["toy"]._replace(V=100), N=6, B=2).batch(torch.float32, "cpu"))
    for tile in tiles:
        launched.clear()
        for run in prepared[tile]:
            run()
        kind, flat = ("_persistent", tile.loop == "flat") if tile.loop else ("", None)
        assert launched == [(f"{kernel}{kind}_kernel", 32, flat) for kernel in kernels]


def test_turns_of_tiles_end_with_the_time_and_what_does_not_run_is_listed(monkeypatch):
    clock, good, bad = [0.0], Tile(16, 32, 32, 4, 4, 1), Tile(16, 64, 32, 2, 4, 1)
    monkeypatch.setattr("bench.sweeps.time.monotonic", lambda: clock[0])

    def run():
        clock[0] += 1.0

    for seconds, turns in ((0, 1), (7.5, 3), (math.inf, 5)):
        clock[0] = 0.0
        found = take_turns({bad: [lambda: 1 / 0], good: [run]}, "cpu", reps=5, seconds=seconds)
        assert found.turns == turns and set(found.medians) == {good} and "ZeroDivision" in found.once[bad].error


def test_turns_end_with_the_time_but_every_provider_has_one_that_counts(monkeypatch):
    clock, order = [0.0], []

    def fake(name):
        def loss(batch):
            clock[0] += 1.0
            order.append(name)
            return batch.hidden.sum() + batch.weight.sum()

        return Provider(name, "torch", "npo", True, loss)

    monkeypatch.setattr(measure, "PROVIDERS", {name: fake(name) for name in "ab"})
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])
    batch = even("even", HEADS["toy"], N=6, B=2).batch(torch.float32, "cpu")
    for seconds, turns in ((0, 1), (7.5, 3), (math.inf, 20)):
        results = interleaved("ab", batch, reps=20, warmup=1, seconds=seconds)
        assert [len(results[name]) for name in "ab"] == [turns, turns], seconds


def test_a_peak_is_of_the_step_alone_and_a_failure_is_a_row():
    case, options = even("even", HEADS["toy"], N=6, B=2), Options("memory", dtype="float32")
    batch = case.batch(torch.float32, "cpu")
    found = peak_of(options, case, "plain/eager", batch)
    assert found["metric"] == "peak_mb" and 0 <= found["value"] < 500 and found["mode"] == "full"
    failed = peak_of(options, case, "plain/product", batch)
    assert failed["status"] == "unsupported" and failed["value"] is None


def test_growth_is_fitted_from_one_process(monkeypatch):
    monkeypatch.setattr(scaling, "peak_of", lambda options, case, name, batch: record(
        "cpu", suite="scaling", case=case.name, provider=name, mode="full", what="fwd_bwd", metric="peak_mb",
        dtype="float32", **case.shape, **summary([10.0 * case.N]),
    ))  # fmt: skip
    found = list(scaling.in_one_process(Options("scaling", providers=("plain/eager",), reps=1, warmup=0), "N"))
    fitted = {r["metric"]: r["value"] for r in found if r["case"] == "over N"}
    assert fitted["exponent_mb"] == pytest.approx(1, abs=0.02) and "exponent_ms" in fitted


def test_what_was_measured_twice_counts_once_the_later_one():
    fields = {"suite": "head", "case": "a", "provider": "b", "metric": "ms"}
    first, second = (
        record("cpu", **fields, **summary([v])) | {"date": d} for v, d in ((1.0, "2026-2"), (2.0, "2026-1"))
    )
    assert [r["value"] for r in latest([first, second])] == [1.0]
    assert len(read_all(RESULTS)) == len(latest(read_all(RESULTS)))


def test_a_record_of_a_kernel_under_its_earlier_name_is_of_the_same_kernel():
    fields = {"suite": "roofline", "case": "R", "provider": "b", "metric": "ms", **summary([1.0])}
    names = ("exp_logits", "exp_logits_kernel", "exp_logits_persistent_kernel")
    found = [record("cpu", tensor=name, **fields) | {"date": str(i)} for i, name in enumerate(names)]
    assert [r["tensor"] for r in latest(found)] == list(names[1:])


def test_the_timeline_of_a_call_on_a_cpu_is_of_its_outermost_operators():
    x = torch.randn(64, 64)
    found = timeline(lambda: (x @ x).softmax(-1), on_gpu=False)
    assert list(found.by_name()) and {"aten::matmul", "aten::softmax"} == set(found.by_name())
    assert 0 <= found.idle < found.total


def test_rates_are_of_counted_work(monkeypatch):
    """A slab at shape R: 2NHV operations in the projection, 4NHV in the vendor's products, bytes elsewhere."""
    case = even("even", HEADS["toy"], N=64, B=4)
    batch = case.batch(torch.float32, "cpu")
    plan = roofline.plan_of("npo_kernels/torch", batch)
    assert plan.mode == "slab"
    spans = [
        Span("exp_logits_kernel", 0, 10),
        Span("exp_logits_kernel", 10, 11),
        Span("nvjet_tst_128x256", 11, 31),
        Span("sm90_xmma_gemm_bf16", 31, 51),
        Span("scale_rows_kernel", 51, 53),
        Span("elementwise", 53, 54),
    ]
    unit = 2 * case.N * case.head.H * case.head.V
    work, products = roofline.counted(Timeline(tuple(spans)), "npo_kernels/torch", batch)
    assert work == {
        "exp_logits_kernel": {"tflops": unit / 1e6},
        "scale_rows_kernel": {"gb_s": 2 * 4 * case.N * case.head.H / 1e3},
    }
    assert products == pytest.approx(2 * unit / 1e6 / 40)
