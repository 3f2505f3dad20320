"""The whole demo at the smallest size: files, finite numbers, and stages that are re-used without changing a digit."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from training.benchmarks.tofu.authors import generate_authors
from training.commands import demo, finetune, unlearn
from training.commands.options import parse
from training.reports.grid import what_to_see

MICRO = {
    "device": "cpu",
    "authors": 4,
    "hidden_size": 64,
    "layers": 1,
    "finetune_epochs": 2,
    "epochs": 2,
    "retain_eval_authors": 2,
}


def run(options):
    """(metrics, what was printed)"""
    console = Console(record=True, file=StringIO(), width=200)
    return demo.main(options, console), console.export_text()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    options = demo.DemoOptions(out=tmp_path_factory.mktemp("demo") / "out", **MICRO)
    return options, *run(options)


def test_metrics_are_complete_and_finite(first):
    options, metrics, _ = first
    assert metrics == json.loads((options.out / "metrics.json").read_text())
    assert [r["method"] for r in metrics["runs"]] == ["npo_rt", "ga"]
    for one in metrics["runs"]:
        history = one["history"]
        assert [entry["epoch"] for entry in history] == [0, 1, 2]
        assert all(0 < entry[f"{group}_prob"] < 1 for entry in history for group in ("forget", "retain"))
        assert all(math.isfinite(entry["train_loss"]) for entry in history[1:])
        assert history[-1]["forget_prob"] < history[0]["forget_prob"]
        assert {key: history[0][key] for key in metrics["start"]["forget10"]} == metrics["start"]["forget10"]
    assert metrics["runs"][0]["step_zero"]["loss"] == pytest.approx(20 * math.log(2), abs=1e-3)


def test_files_are_written_without_paths(first):
    options, metrics, printed = first
    assert (options.out / "epochs_forget10.png").read_bytes().startswith(b"\x89PNG")
    report = (options.out / "report.md").read_text()
    assert "epochs_forget10.png" in report and "NPO+RT" in report and "| GA |" in report
    for name in ("report.md", "metrics.json", "config.json"):
        assert str(options.out) not in (options.out / name).read_text()
    assert json.loads((options.out / "config.json").read_text())["settings"]["authors"] == 4
    assert "Answer probability" in printed and f"{metrics['runs'][1]['history'][-1]['forget_prob']:.3f}" in printed
    assert not [path for path in options.out.rglob("*") if path.name.endswith(".partial")]


def test_a_second_run_reuses_every_stage_and_another_one_is_refused(first, monkeypatch):
    options, metrics, _ = first
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "run", None)
        patch.setattr(finetune, "run", None)
        assert run(options)[0] == metrics
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(replace(options, lr=1e-2))
    with pytest.raises(ValueError, match="something other than this model"):
        run(replace(options, seed=1))
    assert run(options)[0] == metrics


def test_tofu_files_and_another_seed(tmp_path):
    """The seed enters training too, not only the generated authors."""
    data_dir = tmp_path / "tofu"
    data_dir.mkdir()
    rows = generate_authors(10, seed=0)
    for name, part in (("forget10", rows[-20:]), ("retain90", rows[:-20])):
        (data_dir / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = demo.DemoOptions(**{**MICRO, "finetune_epochs": 1, "epochs": 1}, data_dir=data_dir, methods="ga",
                               out=tmp_path / "first")  # fmt: skip
    metrics, _ = run(options)
    assert metrics["rows"] == {"full": 80}
    assert "tofu" not in (options.out / "config.json").read_text().replace("training/", "")
    other, _ = run(replace(options, seed=1, out=tmp_path / "second"))
    assert other["start"] != metrics["start"]


def test_the_command_line_is_a_preset_of_the_grid():
    (options,) = parse(demo.DemoOptions, "training.demo", "", ["--data_dir", "tofu", "--epochs", "3", "--lr", "1e-5"])
    chosen, authors = demo.grid_options(options)
    assert (chosen.epochs, chosen.lr, chosen.finetune_epochs, chosen.finetune_lr) == (3, 1e-5, 8, 2e-3)
    assert (authors.options.data_dir, authors.options.authors, chosen.retrain) == (Path("tofu"), 40, False)
    chosen, authors = demo.grid_options(demo.DemoOptions(seed=7))
    assert (chosen.lr, chosen.retain_weight, chosen.seed, chosen.seeds) == (6e-4, 5.0, 7, "7")
    assert (authors.options.authors, authors.options.data_seed, authors.options.data_dir) == (60, 7, None)


def test_the_paragraph_follows_the_numbers():
    def history(forget, retain):
        return [[{"forget_prob": f, "retain_prob": r} for f, r in ((0.9, 0.9), (forget, retain))]]

    start = {"forget_prob": 0.9, "retain_prob": 0.9}
    text = what_to_see(start, {"npo_rt": history(0.05, 0.85), "ga": history(0.5, 0.01)})
    assert "to 0.05 and 0.85: what was to be forgotten is lost, what was to be kept is kept" in text
    assert "to 0.5 and 0.01: what was to be forgotten is damaged, what was to be kept is lost" in text
    assert what_to_see({"accuracy": 0.5}, {}) == ""
