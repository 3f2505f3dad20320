"""Records on disk, comparisons, the report and the target table, the roofline, tuning, the command line."""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import figures, report, roofline, sweeps, tune, variants
from bench.__main__ import main
from bench.cases import Case, Head, R
from bench.compare import common, verdict
from bench.figures import panels_of
from bench.isolate import take_turns
from bench.measure import Failure
from bench.records import RESULTS, merged, read, record, summary, write
from bench.report import targets_page
from bench.targets import OURS, SMALL, TARGETS, Results
from npo_kernels.backends.tiles import Row


def made(value, **fields):
    spread = {"value": value, "p20": value and 0.9 * value, "p80": value and 1.1 * value, "reps": 20}
    known = {"suite": "head", "case": R.name, "provider": OURS, "mode": "full", "what": "fwd_bwd", "dtype": "bfloat16"}
    return record("cpu", **{**known, **R.shape, "metric": "ms", "exact": True, "computes": "npo", **spread, **fields})


def test_write_and_read(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    records = [made(1.0), made(2.0, provider="plain/eager")]
    write(path, records)
    assert read(path) == records and [p.name for p in path.parent.iterdir()] == ["results.jsonl"]
    with pytest.raises(ValueError, match="unknown fields"):
        record("cpu", colour="red")


def test_merging_replaces_what_was_measured_again():
    before, found = [made(1.0), made(2.0, provider="plain/eager")], [made(3.0)]
    assert [r["value"] for r in merged(before, found)] == [2.0, 3.0]


def test_an_interrupted_run_keeps_the_finished_cases(tmp_path):
    from bench.__main__ import _collect

    def interrupted():
        yield made(1.0, case="a")
        yield made(2.0, case="b")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _collect(interrupted(), tmp_path / "r.jsonl", merge=False)
    assert [r["case"] for r in read(tmp_path / "r.jsonl")] == ["a"]


def test_committed_results_can_be_read():
    """The first format had no status, mode or version of the provider."""
    files = sorted(RESULTS.glob("*.jsonl"))
    assert files
    for path in files:
        for r in read(path):
            assert r["status"] != "ok" or (r["value"] > 0 or r["metric"] != "ms"), path
            assert r["mode"] in ("full", "frozen", "logprobs") and r["commit"]


def test_summary():
    assert summary([3.0]) == {"value": 3.0, "p20": 3.0, "p80": 3.0, "reps": 1}
    assert summary([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == {"value": 5, "p20": 2, "p80": 8, "reps": 11}


def test_compare(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(a, [made(10.0), made(10.0, provider="plain/eager"), made(5.0, metric="tflops")])
    write(b, [made(5.0), made(10.5, provider="plain/eager"), made(1.0, case="other")])
    pairs = list(common(read(a), read(b), ["ms"]))
    assert [(x["provider"], verdict(x, y)) for x, y in pairs] == [(OURS, "less"), ("plain/eager", "same")]
    assert main(["compare", str(a), str(b)]) == 0
    assert "0.500" in capsys.readouterr().out
    write(b, [made(1.0, case="other")])
    assert main(["compare", str(a), str(b)]) == 1


def test_targets_need_a_gpu_and_are_computed_from_records():
    page = targets_page([made(1.0), made(2.0, provider="plain/eager")])
    assert page.count("not measured") == len(TARGETS) and "no GPU" in page
    gpu = {"gpu": "NVIDIA H200", "driver": "1"}
    frozen, logprobs = {"mode": "frozen"}, {"mode": "logprobs", "what": "logprobs"}
    memory = {"suite": "memory", "metric": "peak_mb"}
    gradients = 2 * (8192 + 128256) * 4096 / 2**20
    records = [
        made(30.0, **gpu),
        made(36.0, provider=SMALL, **gpu),
        made(60.0, provider="trl/chunked", **gpu),
        made(20.0, provider="cce/default", exact=False, **gpu),  # inexact: does not count
        made(31.0, provider="quack/base", computes="ce", **gpu),
        made(700.0, metric="tflops", **gpu),
        made(770.0, metric="tflops", suite="ceilings", case="product 8192", provider="torch", **gpu),
        made(20.0, **frozen, **gpu),
        made(50.0, provider="liger/scaled", **frozen, **gpu),
        made(12.0, **logprobs, **gpu),
        made(11.0, provider="plain/product", computes="product", **logprobs, **gpu),
        made(1000 + gradients, **memory, **gpu),
        made(200 + gradients, provider=SMALL, **memory, **gpu),
        made(10000 + gradients, provider="plain/eager", **memory, **gpu),
    ]
    results = Results([r | {"gpu": r["gpu"]} for r in records])
    texts = [outcome and outcome.text for outcome in (target.measure(results) for target in TARGETS)]
    assert texts[0].startswith("0.50x") and "trl/chunked" in texts[0]
    assert texts[1].startswith("0.97x") and "quack/base" in texts[1]
    assert texts[2].startswith("91%") and texts[3].startswith("0.40x") and texts[4].startswith("1.09x")
    assert texts[5] is None
    assert texts[6].startswith("10.0% (1000 MiB") and texts[7] == "2.0% (200 MiB of 10000) at 1.20x the time"
    page = targets_page([*records, made(29.0, gpu="NVIDIA H100", driver="1")])
    assert page.count("## NVIDIA H200\n") == page.count("## NVIDIA H100\n") == 1
    assert page.count("| NVIDIA H200, driver 1 |") == 7 and "| NVIDIA H100" not in page  # figures of one GPU only


def test_a_figure_has_a_panel_for_each_dtype():
    rows = [made(v, suite="cpu", case="wide", dtype=d) for v, d in ((1.0, "float32"), (2.0, "bfloat16"))]
    panels = panels_of("cpu", rows)
    assert [(label, [r["value"] for r in found]) for label, _, found in panels] == [
        ("ms, float32", [1.0]), ("ms, bfloat16", [2.0])
    ]  # fmt: skip
    assert [label for label, *_ in panels_of("cpu", rows[:1])] == ["ms"]


def test_the_headline_has_the_providers_that_have_both_measurements_on_one_gpu(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, dpi: drawn.append(figure) or figure.savefig(path))

    def measured(gpu, provider, ms, mib, date="2026-01-01"):
        fields = {"gpu": gpu, "provider": provider}
        both = made(ms, **fields), made(mib, **fields, suite="memory", metric="peak_mb")
        return [r | {"date": date} for r in both]

    def bars():
        """title -> label -> value, from the top."""
        return {
            panel.get_title("left"): {
                label.get_text(): bar.get_width()
                for label, bar in reversed([*zip(drawn[-1].axes[0].get_yticklabels(), panel.patches, strict=True)])
            }
            for panel in drawn[-1].axes
        }

    path = tmp_path / "peers.png"
    one = [*measured("H200", OURS, 9.0, 9.0), *measured("H100", OURS, 50.0, 1024.0)]
    assert figures.headline(one, path) is None and not path.exists()  # nothing to compare with
    later = measured("H100", OURS, 40.0, 2048.0, date="2026-02-01")
    others = measured("H100", "plain/eager", 60.0, 8192.0) + measured("H100", "quack/base", 1.0, 1.0)
    incomplete = measured("H100", "trl/chunked", 70.0, 1.0)[:1]
    cold = [made(1.0, gpu="H100", l2="cold") | {"date": "2026-03-01"}]
    assert figures.headline([*later, *one, *others, *incomplete, *cold], path) == "H100" and path.stat().st_size
    assert bars() == {
        "time, ms": {"npo_kernels": 40.0, "plain PyTorch": 60.0},
        "peak memory beyond the inputs, GiB": {"npo_kernels": 2.0, "plain PyTorch": 8.0},
    }


def test_report(tmp_path):
    folder = tmp_path / "results"
    rows = [made(v, case=f"toy/N={n}", N=n, metric=m) for n, v in ((64, 1.0), (128, 2.0)) for m in ("ms", "tflops")]
    rows += [record("cpu", suite="head", case="toy/N=64", provider="trl/chunked", mode="full", what="fwd_bwd",
                    dtype="bfloat16", **R.shape, metric="ms", exact=True, computes="npo", status="missing",
                    error="No module named 'trl'")]  # fmt: skip
    rows += [made(1e-3, suite="accuracy", case=c, metric="rel_err", tensor="logps") for c in ("random", "peaked")]
    write(folder / "x.jsonl", rows)
    assert main(["report", "--results", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "toy/N=128" in text and "No module named 'trl'" in text
    images = sorted(folder.glob("*.png"))
    with pytest.MonkeyPatch.context() as patch:  # the README's figure is drawn from the committed results only
        patch.setattr(report, "RESULTS", folder)
        patch.setattr(report, "HEADLINE", tmp_path / "docs" / "peers.png")
        main(["report", "--results", str(folder)])
        assert not (tmp_path / "docs").exists()  # nothing was measured beside a peer on a GPU
        fields = [{"gpu": "H200", "provider": name} for name in (OURS, "plain/eager")]
        memory = {"suite": "memory", "metric": "peak_mb"}
        write(folder / "y.jsonl", [made(1.0, **f | more) for f in fields for more in ({}, memory)])
        main(["report", "--results", str(folder)])
        assert (tmp_path / "docs" / "peers.png").exists()
        (folder / "y.jsonl").unlink()
    assert len(images) == 2 and all(f"({image.name})" in text for image in images)
    assert "not measured" in (tmp_path / "RESULTS.md").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_roofline_counts_what_the_design_counts():
    """6NHV = 25.8 TFLOP, 8NHV = 34.4 TFLOP at R; 4NHV frozen, 2NHV log-probabilities."""
    N, H, V = R.shape["N"], R.shape["H"], R.shape["V"]
    counted, predicted = {}, {}
    for wanted, workspace in (("full", 4608), ("full", 256), ("frozen", 4608), ("logprobs", 4608)):
        plan = roofline.plan_for(wanted, N, H, V, 32, workspace)
        steps = roofline.launches(plan, N, H, V)
        counted[plan.mode] = sum(step.operations for step in steps) / 1e12
        predicted[plan.mode] = sum(step.seconds(roofline.CEILINGS["h200"]) for step in steps)
        assert predicted[plan.mode] > roofline.floor(wanted, N, H, V, roofline.CEILINGS["h200"])
    assert counted == pytest.approx({"slab": 25.82, "recompute": 34.43, "frozen": 17.21, "no_grad": 8.607}, rel=1e-3)
    assert sorted(predicted, key=predicted.get) == ["no_grad", "frozen", "slab", "recompute"]


def test_roofline_says_that_it_is_a_model(capsys):
    assert main(["roofline", "--N", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "MODEL, not a measurement" in printed and "slab" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so(capsys):
    assert main(["tune"]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_sweep_times_what_runs_and_lists_what_does_not():
    pytest.importorskip("triton")
    from csrc_triton.tiles import Tile

    good, bad = Tile(16, 32, 32, 2, 4, 1), Tile(15, 32, 32, 2, 4, 1)  # a block that is no power of two
    hidden, weight = torch.randn(16, 32), torch.randn(64, 32)
    persistent = good._replace(loop="flat")
    found = tune.sweep([good, bad, persistent], hidden, weight, torch.randint(64, (16,)), reps=1)
    assert found.once[good] > 0 and isinstance(found.once[bad], Failure)
    assert set(found.medians) == {good, persistent} and found.turns == 1


def test_candidates_are_persistent_where_there_are_descriptors():
    def loops(architecture, bits):
        found = tune.candidates(architecture, bits)
        assert 50 < len(found) == len(set(found)) < 400
        assert {tile.split for tile in found} == {tune.SPLIT}
        return {tile.loop for tile in found}

    assert loops("sm_80", 16) == loops("gfx942", 16) == loops("sm_90", 32) == {""}
    assert loops("sm_90", 16) == {"", "serial", "flat"}
    assert loops("sm_100", 16) == {"", "serial", "flat", "specialized"}


def test_a_tile_wins_by_a_margin_only():
    from csrc_triton.tiles import Tile

    present, other = Tile(64, 64, 64, 16, 4, 3), Tile(64, 128, 64, 8, 4, 3)
    assert sweeps.winner({present: 1.0, other: 0.9}, present) == other
    assert sweeps.winner({present: 1.0, other: 0.99}, present) == present
    assert sweeps.winner({other: 5.0}, present) == other  # the one in force does not run
    assert sweeps.winner({}, present) == present  # none does


def test_what_wins_is_entered_in_the_table():
    from csrc_triton import tiles

    def table(source):
        scope = {"__name__": "edited"}
        exec(source, scope)
        return {key: tuple(tile) for key, tile in scope["TILES"].items()}, scope["PAIR_TILES"].keys()

    source = tune.TABLE.read_text()
    before, pairs = table(source)
    assert before == {key: tuple(tile) for key, tile in tiles.TILES.items()}
    for tile in (tiles.Tile(128, 256, 64, 4, 8, 3, loop="flat"), tiles.Tile(64, 256, 64, 4, 8, 4, 4, 2)):
        source = tune.with_entry(source, sweeps.entry("sm_90", 16, 3584, tile))
        assert table(source) == (before | {("sm_90", 16, 4096): tuple(tile)}, pairs)
    assert '    ("sm_90", 16, 4096): Tile(64, 256, 64, 4, 8, 4, group=4, pieces=2),\n' in source


@pytest.mark.parametrize(("architecture", "bits"), [("sm_90", 16), ("sm_100", 32)])
@pytest.mark.parametrize("kind", tune.TABLES)
def test_what_was_swept_is_measured_whether_it_won_or_not(architecture, bits, kind):
    from csrc_triton import tiles

    sweep, scope, (table, measured) = {"H": 5120, "suggestion": None}, {"__name__": "edited"}, tune.TABLES[kind]
    exec(tune.with_sweep(tune.TABLE.read_text(), architecture, bits, sweep, RESULTS / "new.json", kind), scope)
    assert scope[measured] == getattr(tiles, measured) | {(architecture, bits, 8192): "bench/results/new.json"}
    assert scope[table].keys() == getattr(tiles, table).keys()


def test_what_wins_of_kl_and_moments_is_entered_in_their_tables(monkeypatch):
    """Two hidden sizes each, into tables that begin empty."""
    from csrc_triton import tiles

    tile = tiles.PERSISTENT_PAIR_CANDIDATES["sm_90", 16, tiles.ANY_HIDDEN]
    monkeypatch.setattr(
        variants, "take_turns", lambda runs, *_, **__: sweeps.Times({}, {t: 3.0 - bool(t.loop) for t in runs}, 1)
    )
    monkeypatch.setattr(variants, "pair_runs", lambda tiles, _: dict.fromkeys(tiles))
    monkeypatch.setattr(variants, "moment_runs", lambda tiles, _: dict.fromkeys(tiles))
    source = tune.TABLE.read_text()
    for H in (576, 4096):
        batch = Case("a", Head(H, 8), ((0, 2),)).batch(torch.bfloat16, "cpu")
        for kind, measure in (("pairs", variants.sweep_pairs), ("moments", variants.sweep_moments)):
            found = measure(Row("sm_90", "sm_90"), [tile._replace(loop=""), tile], batch, 1)
            source = tune.with_sweep(source, "sm_90", 16, found, RESULTS / "new.json", kind)
    scope = {"__name__": "edited"}
    exec(source, scope)
    new = [("sm_90", 16, 1024), ("sm_90", 16, 4096)]
    assert {key: scope["PAIR_TILES"][key] for key in new} == dict.fromkeys(new, tuple(tile))
    assert scope["MOMENT_LOOPS"] == tiles.MOMENT_LOOPS | dict.fromkeys(new, "flat")
    for measured in ("PAIR_MEASURED", "MOMENT_MEASURED"):
        assert scope[measured] == getattr(tiles, measured) | dict.fromkeys(new, "bench/results/new.json")
    assert scope["TILES"].keys() == tiles.TILES.keys() and scope["MEASURED"] == tiles.MEASURED


def test_tuning_writes_everything_down_and_moments_have_the_tile_that_won(tmp_path, monkeypatch, capsys):
    """The whole command on a GPU that is made up: of two tiles the last is the fastest."""
    from csrc_triton import tiles

    best = tiles.Tile(64, 128, 64, 8, 8, 3)

    def turns(runs, *_, **__):
        return sweeps.Times({}, {tile: 2.0 - number / 10 for number, tile in enumerate(runs)}, 1)

    batch = Case("a", Head(5120, 8), ((0, 2),)).batch(torch.bfloat16, "cpu")
    table, out = tmp_path / "tiles.py", tmp_path / "tune.json"
    table.write_text(tune.TABLE.read_text())
    for module, name, value in (
        (torch.cuda, "is_available", lambda: True), (tune, "row_of", lambda _: Row("sm_90", "sm_90")),
        (tune, "batch_of", lambda *_: batch), (tune, "candidates", lambda *_: [best]), (tune, "TABLE", table),
        (tune, "take_turns", turns), (variants, "take_turns", turns), (tune, "environment", lambda _: {}),
        (tune, "record", lambda _: {"date": ""}), (variants, "pair_runs", lambda tiles, _: dict.fromkeys(tiles)),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    assert main(["tune", "--H", "5120", "--write", "--out", str(out)]) == 0
    scope, key, found = {"__name__": "edited"}, ("sm_90", 16, 8192), json.loads(out.read_text())
    exec(table.read_text(), scope)
    assert scope["TILES"][key] == tuple(best) and scope["MOMENT_LOOPS"][key] == "flat" and scope["PAIR_TILES"][key].loop
    assert next(iter(found["moments"][0]["medians"])) == repr(best._replace(loop="flat"))
    printed = capsys.readouterr().out
    for kind, (_, measured) in tune.TABLES.items():
        assert table.parents[1] / scope[measured][key] == out and found[kind][0]["suggestion"] in printed


def test_command_line(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    command = ["run", "--suite", "accuracy", "--case", "random", "--providers", "plain/eager", "--device", "cpu"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert main([*command, *threads, "--out", str(out), "--allow_dirty"]) == 0
    assert {json.loads(line)["dtype"] for line in Path(out).read_text().splitlines()} == {"bfloat16"}
    assert "rel_err" in capsys.readouterr().out
    assert main(["run", "--suite", "head", "--providers", "nobody", "--device", "cpu", *threads]) == 2
    assert "unknown provider 'nobody'" in capsys.readouterr().err
    assert main([*command[:3], "--case", "nowhere", "--device", "cpu", *threads]) == 2


def test_targets_of_a_cpu_are_against_the_better_convention_and_what_took_too_long_is_a_bound():
    fields = {"suite": "cpu", "case": "wide", "threads": 2, "bfloat16": "no bfloat16 instructions", "cpu_limits": None}
    half = fields | {"dtype": "bfloat16", "case": "llama"}
    full = fields | {"dtype": "float32"}
    slow = {"status": "slow", "over_ms": 12000.0, "error": "more than 12 s"}
    records = [
        made(400.0, provider="npo_kernels/torch", **full),
        made(300.0, provider="npo_kernels/torch", **{**full, "metric": "peak_mb"}),
        made(1000.0, provider="plain/eager", **full),
        made(800.0, provider="plain/rounded", **full),
        made(6000.0, provider="plain/eager", **{**full, "metric": "peak_mb"}),
        made(360.0, provider="plain/products", **full),
        made(1200.0, provider="npo_kernels/torch", **half),
        made(None, provider="plain/eager", **half, **slow),
    ]
    page = targets_page(records)
    assert "| 0.50x (400 of 800 ms) | 0.45x (360 of 800 ms) | 90% | 0.05x (300 of 6000 MiB) |" in page
    assert "| < 0.10x (1200 of more than 12000 ms) | not measured | not measured |" in page
    assert "in float32 copies (no bfloat16 instructions)" in page and "A CPU with bfloat16 instructions" in page
    native = targets_page([*records, made(1.0, **{**full, "bfloat16": "native"})])
    assert ", 2 threads: bfloat16 products native" in native
    assert "A CPU with bfloat16 instructions" not in native


def test_a_turn_that_takes_too_long_is_ended_and_one_long_enough_needs_no_warm_up():
    quick, long, endless = take_turns([Sleeper(0.0), Sleeper(0.9), Sleeper(60.0)]).values()
    assert len(quick) == 2 and len(long) == 2
    assert endless == Failure("slow", "more than 2.5 s")


@dataclass(frozen=True)
class Sleeper:
    seconds: float
    device: str = "cpu"
    threads: int = 1
    warmup: int = 1
    reps: int = 2
    whole: bool = False
    limit: float = 2.5
    patience: float = 0.0

    def prepare(self):
        return partial(time.sleep, self.seconds)
