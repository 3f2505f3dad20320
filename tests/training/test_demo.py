"""The whole demo at the smallest size: files, finite numbers, and stages that are re-used without changing a digit."""

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from training import pipeline
from training.authors import generate_authors
from training.config import Config, from_command_line, with_presets
from training.demo import main
from training.report import what_to_see

MICRO = {
    "device": "cpu",
    "authors": 4,
    "vocab_size": 500,
    "hidden_size": 64,
    "layers": 1,
    "finetune_epochs": 2,
    "epochs": 2,
    "retain_eval_authors": 2,
}


def run(config):
    """(metrics, what was printed)"""
    console = Console(record=True, file=StringIO(), width=200)
    return main(config, console), console.export_text()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    config = with_presets(Config(out=tmp_path_factory.mktemp("demo") / "out", **MICRO))
    return config, *run(config)


def test_metrics_are_complete_and_finite(first):
    config, metrics, _ = first
    assert metrics == json.loads((config.out / "metrics.json").read_text())
    assert set(metrics["history"]) == {"npo_rt", "ga"}
    for history in metrics["history"].values():
        assert [entry["epoch"] for entry in history] == [0, 1, 2]
        assert all(0 < e[f"{group}_probability"] < 1 for e in history for group in ("forget", "retain"))
        assert all(math.isfinite(entry["train_loss"]) for entry in history[1:])
        assert history[0]["forget_log_ratio"] == pytest.approx(0, abs=1e-3)
        assert history[-1]["forget_log_ratio"] < 0
    assert metrics["history"]["npo_rt"][0] == metrics["history"]["ga"][0]
    assert metrics["step_zero"]["loss"] == pytest.approx(20 * math.log(2), abs=1e-3)


def test_files_are_written_without_paths(first):
    config, _, printed = first
    assert (config.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    report = (config.out / "report.md").read_text()
    assert "figure.png" in report and "NPO+RT" in report and "GA, gradient ascent" in report
    for name in ("report.md", "metrics.json", "config.json"):
        assert str(config.out) not in (config.out / name).read_text()
    assert json.loads((config.out / "config.json").read_text())["settings"]["authors"] == 4
    assert "Answer probability" in printed
    assert not [path for path in config.out.rglob("*") if path.name.endswith(".partial")]


def outcome(config, monkeypatch, *, may_run=()):
    """metrics.json of one more run, in which only the stages named may run."""

    def refuse(name):
        def stage(*args, **kwargs):
            raise AssertionError(f"{name} ran again")

        return stage

    with monkeypatch.context() as patch:
        for name in {"finetune", "compute_reference", "unlearn"} - set(may_run):
            patch.setattr(pipeline, name, refuse(name))
        run(config)
    return (config.out / "metrics.json").read_bytes()


def test_a_second_run_reuses_every_stage(first, monkeypatch):
    config, _, _ = first
    before = (config.out / "metrics.json").read_bytes()
    assert outcome(config, monkeypatch) == before


def test_a_resumed_run_equals_an_uninterrupted_one(first, monkeypatch):
    config, _, _ = first
    before = (config.out / "metrics.json").read_bytes()
    (config.out / "unlearn_ga.json").write_text('{"key": "')  # died while writing, on a file system without renames
    (config.out / "reference_cache.safetensors").unlink()
    assert outcome(config, monkeypatch, may_run=("compute_reference", "unlearn")) == before
    (config.out / "model" / "stage.json").unlink()
    assert outcome(config, monkeypatch, may_run=("finetune",)) == before


def test_changed_settings_rerun_what_depends_on_them(first, monkeypatch):
    config, metrics, _ = first
    before = (config.out / "metrics.json").read_bytes()
    changed = json.loads(outcome(replace(config, lr=1e-2), monkeypatch, may_run=("unlearn",)))
    assert changed["finetune_loss"] == metrics["finetune_loss"]
    assert changed["history"]["ga"][-1] != metrics["history"]["ga"][-1]
    with pytest.raises(AssertionError, match="finetune ran again"):
        outcome(replace(config, finetune_lr=1e-4), monkeypatch)
    with pytest.raises(AssertionError, match="finetune ran again"):
        outcome(replace(config, fresh=True), monkeypatch)
    everything = ("finetune", "compute_reference", "unlearn")
    assert outcome(config, monkeypatch, may_run=everything) == before


def test_tofu_files_and_another_seed(tmp_path, monkeypatch):
    """The seed enters training too, not only the generated authors."""
    data_dir = tmp_path / "tofu"
    data_dir.mkdir()
    rows = generate_authors(10, seed=0)
    for name, part in (("forget10", rows[-20:]), ("retain90", rows[:-20])):
        (data_dir / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = with_presets(
        Config(**{**MICRO, "finetune_epochs": 1, "epochs": 1}, out=tmp_path / "out", data_dir=data_dir)
    )
    metrics, _ = run(config)
    assert metrics["data"]["name"] == "TOFU, forget10"
    assert (metrics["data"]["authors"], metrics["data"]["forget_authors"]) == (4, 1)
    assert "tofu" not in (config.out / "config.json").read_text()
    with pytest.raises(AssertionError, match="finetune ran again"):
        outcome(replace(config, seed=1), monkeypatch)


def test_command_line():
    config = from_command_line(["--data_dir", "tofu", "--epochs", "3", "--lr", "1e-5", "--fresh"], "")
    assert (config.data_dir, config.epochs, config.lr, config.fresh) == (Path("tofu"), 3, 1e-5, True)
    assert config.authors > 1 and config.finetune_epochs > 0
    assert from_command_line([], "") == with_presets(Config())


def test_the_paragraph_follows_the_numbers():
    def history(forget, retain):
        return [{"forget_probability": f, "retain_probability": r} for f, r in ((0.9, 0.9), (forget, retain))]

    text = what_to_see({"npo_rt": history(0.05, 0.85), "ga": history(0.5, 0.01)})
    assert "to 0.05 and 0.85: what was to be forgotten is lost, what was to be kept is kept" in text
    assert "to 0.5 and 0.01: what was to be forgotten is damaged, what was to be kept is lost" in text
