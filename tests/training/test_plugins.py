"""The interface of a plug-in: a method of ten lines and a benchmark of thirty work with everything else unchanged."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch

from training.benchmarks.base import BENCHMARKS, Benchmark, Column
from training.benchmarks.base import register as register_benchmark
from training.commands import attack, demo, evaluate, finetune, grid, tiny, unlearn
from training.commands.options import parse
from training.methods import METHODS, Batch, Method, Settings, method_named, register, table
from training.scoring import score

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------ a method


def bounded_ascent(batch: Batch, settings: Settings) -> torch.Tensor:
    rows = batch.rows("forget")
    return -batch.sequence_mean(torch.exp(rows.logps / rows.num_tokens.clamp(min=1)).neg() / settings.beta)


BOUNDED = Method(
    "bounded", "Bounded", "(1/beta) mean_s p^(1/|y|)", "nobody's", bounded_ascent, "#123456", retain="nll",
    defaults={"beta": 0.5},
)  # fmt: skip


@pytest.fixture
def bounded() -> Iterator[Method]:
    yield register(BOUNDED)
    del METHODS["bounded"]


def test_a_method_trains_evaluates_and_appears_everywhere(bounded, tmp_path, capsys):
    options = demo.DemoOptions(
        device="cpu", authors=4, hidden_size=64, finetune_epochs=2, epochs=2, retain_eval_authors=2, lr=1e-2,
        methods="bounded,npo", retain_weight=0.1, out=tmp_path / "demo",
    )  # fmt: skip
    metrics = demo.main(options)
    first, last = (metrics["runs"][0]["history"][i] for i in (0, -1))
    assert metrics["runs"][0]["method"] == "bounded" and last["forget_prob"] < first["forget_prob"]
    report = (tmp_path / "demo" / "report.md").read_text()
    assert "| Bounded |" in report and "- Bounded: " in report and "Bounded takes them to" in report
    assert "Bounded" in capsys.readouterr().out
    one = tmp_path / "demo" / "forget10" / "bounded" / "seed0"
    assert "by Bounded" in (one / "report.md").read_text()
    assert json.loads((one / "config.json").read_text())["settings"]["beta"] == 0.1  # of the demo, for every method
    assert BOUNDED.settings().beta == 0.5
    with pytest.raises(SystemExit):
        parse(unlearn.UnlearnOptions, "training.unlearn", "", ["--help"])
    assert "bounded" in capsys.readouterr().out
    assert table()[-1] == ("bounded", BOUNDED.formula, "nobody's")
    with pytest.raises(ValueError, match="bounded is taken"):
        register(BOUNDED)


def test_a_misspelt_method_names_the_nearest(bounded):
    assert method_named("grad_diff") is METHODS["ga_rt"]
    with pytest.raises(ValueError, match="got 'bonded'; did you mean bounded"):
        method_named("bonded")


# ------------------------------------------------------------------ a benchmark


@dataclass(frozen=True)
class ToyOptions:
    """Of the toy."""

    numbers: Annotated[int, "how many numbers there are to learn"] = 8


@register_benchmark
class Toy(Benchmark):
    name, Options, title, legend = "toy", ToyOptions, "Successors", "Known: share of the rows with p > 1/2."
    columns = {"forget_prob": Column("forget prob", "forget"), "known": Column("known")}  # noqa: RUF012

    def rows(self, split):
        rows = [{"question": f"What follows {i}?", "answer": f"It is {i + 1}."} for i in range(self.options.numbers)]
        parts = {"full": rows, "forget": rows[-2:], "retain": rows[:-2]}
        if split not in parts:
            raise ValueError(f"--split: expected one of {', '.join(parts)}, got {split}")
        return parts[split]

    def evaluate(self, model, format, pieces, progress):
        return {split: score(model, self.encode(format, self.rows(split)), 0).answer_probability.tolist()
                for split in ("forget", "full")}  # fmt: skip

    def summarize(self, measures, retrained=None):
        full = measures["full"]
        return {"forget_prob": sum(measures["forget"]) / 2, "known": sum(p > 0.5 for p in full) / len(full)}


def test_a_benchmark_runs_the_whole_command_line(tmp_path, capsys):
    """`python -m training.COMMAND --benchmark toy ...`, from a model of nothing to an attack."""

    def run(command, kind, *arguments):
        words = ["--benchmark", "toy", "--numbers", "6", *map(str, arguments)]
        return command.main(*parse(kind, command.PROG, "", words))

    base, full, out = (tmp_path / name for name in ("base", "full", "out"))
    run(tiny, tiny.TinyOptions, "--out", base, "--vocab_size", 300, "--hidden_size", 64)
    fast = ("--preset", "tiny", "--device", "cpu", "--batch_size", 2)
    run(finetune, finetune.FinetuneOptions, *fast, "--model", base, "--out", full, "--epochs", 20, "--lr", 1e-2)
    there = tmp_path / "evaluation"
    found = run(evaluate, evaluate.EvaluateOptions, "--model", full / "model", "--out", there, "--json")
    assert found["known"] == 1.0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    log = there / evaluate.LOG_FILE
    assert run(evaluate, evaluate.EvaluateOptions, "--from_log", log) == found
    model = ("--model", full / "model")
    capsys.readouterr()
    run(unlearn, unlearn.UnlearnOptions, *fast, *model, "--dry_run", "--out", out)
    assert json.loads(capsys.readouterr().out)["rows"] == {"forget": 2, "retain": 4}
    metrics = run(unlearn, unlearn.UnlearnOptions, *fast, *model, "--method", "dpo_rt", "--epochs", 4, "--out", out)
    before, *_, after = (entry["forget_prob"] for entry in metrics["history"])
    assert after < before == pytest.approx(found["forget_prob"])
    report = (out / "report.md").read_text()
    assert "# Unlearning forget by DPO+RT" in report and Toy.legend in report and "forget prob" in report
    cells = run(grid, grid.GridOptions, *fast, *model, "--methods", "ga,npo_rt", "--seeds", "0,1", "--epochs", 2,
                "--finetune_epochs", 2, "--out", tmp_path / "grid")["runs"]  # fmt: skip
    assert len(cells) == 4 and all(math.isfinite(cell["history"][-1]["forget_prob"]) for cell in cells)
    assert (tmp_path / "grid" / "epochs_forget.png").exists()
    assert "# Successors: unlearning by 2 methods" in (tmp_path / "grid" / "report.md").read_text()
    attacked = run(attack, attack.AttackOptions, "quantize", "--model", out / "model", "--out", tmp_path / "attack")
    assert list(attacked["stages"]) == ["unlearned", "int8", "int4", "nf4"]
    with pytest.raises(ValueError, match="toy has one forget set"):
        run(grid, grid.GridOptions, *fast, *model, "--forget_percents", "1,5")


def test_commands_know_the_registry(capsys):
    assert BENCHMARKS.keys() >= {"tofu", "authors", "toy"}
    with pytest.raises(ValueError, match="one of that name already"):
        register_benchmark(Toy)
    with pytest.raises(SystemExit):
        parse(evaluate.EvaluateOptions, "training.evaluate", "", ["--benchmark", "toy", "--help"])
    said = capsys.readouterr().out
    assert "--numbers" in said and "--forget_percent" not in said


def test_the_list_of_commands_is_a_command():
    done = subprocess.run([sys.executable, "-m", "training"], cwd=ROOT, capture_output=True, text=True)
    commands = {path.stem for path in (ROOT / "training" / "commands").glob("*.py")}
    named = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}
    assert done.returncode == 0 and "unlearn" in named and named <= commands
