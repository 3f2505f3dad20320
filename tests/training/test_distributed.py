"""Two processes, started by `accelerate launch` with each of the launch files, give the numbers of one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import distributed
from training.commands import authors, demo, tiny, unlearn
from training.commands.options import build
from training.data import Example

ROOT = Path(__file__).resolve().parents[2]
# 19 sequences a step: ragged shares, and a last batch of the forget set with one row for two processes
SETTINGS = {"device": "cpu", "authors": 4, "hidden_size": 64, "layers": 1, "batch_size": 19,
            "finetune_epochs": 3, "epochs": 2, "retain_eval_authors": 2}  # fmt: skip
UNLEARN = {"preset": "tiny", "device": "cpu", "forget_percent": 5, "batch_size": 7, "epochs": 2,
           "micro_batch_size": 2, "eval_rows": 4, "max_new_tokens": 3, "save_steps": 2}  # fmt: skip
SCRIPTS = {
    "ddp": ["-m", "training.demo"],
    "fsdp2": ["tests/training/fsdp2_on_cpu.py"],
    "zero3": ["-m", "training.demo"],
}


def launch(how: str, script: list[str], settings: dict, out: Path) -> dict:
    """metrics.json of two processes."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"training/launch/{how}.yaml"]
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, *launcher, *script, *options, "--out", str(out)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return demo.main(demo.DemoOptions(**SETTINGS, out=tmp_path_factory.mktemp("one") / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("how", SCRIPTS)
def test_two_processes_give_the_numbers_of_one(how, one_process, tmp_path):
    if how == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; tests/hf/parity_versions.sh runs this")
    metrics = launch(how, SCRIPTS[how], SETTINGS, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["device"].startswith("2 processes on cpu")
    start = one_process["start"]["forget10"]
    assert metrics["start"]["forget10"] == pytest.approx(start, rel=1e-4)  # after fine-tuning
    for one, two in zip(one_process["runs"], metrics["runs"], strict=True):
        assert one["history"][-1]["forget_prob"] < 0.9 * start["forget_prob"]  # there is something to compare
        for theirs, ours in zip(one["history"], two["history"], strict=True):
            for entry in (theirs, ours):
                entry["train_loss"] = entry["train_loss"] or 0.0  # none before the first epoch
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert metrics["samples"] == one_process["samples"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "given"),
    [("dpo_kl", {}), ("pdu_rt", {"dual_warmup_epochs": 0, "retain_weight": 1, "dual_lr": 0.5})],
)
def test_two_processes_unlearn_as_one_does(method, given, tmp_path):
    """Accumulation without exchange until the last pass, two kinds of forward, evaluation and checkpoints; a retain
    weight that all agree on."""
    authors.main(authors.AuthorsOptions(out=tmp_path / "data", authors=20, seed=0))
    data, base = str(tmp_path / "data"), tmp_path / "base"
    tiny.main(*build(tiny.TinyOptions, data_dir=data, split="forget20", out=base, vocab_size=400, hidden_size=64))
    settings = UNLEARN | {"model": str(base), "data_dir": data, "method": method} | given
    one = unlearn.main(*build(unlearn.UnlearnOptions, **settings, out=tmp_path / "one"))
    two = launch("ddp", ["-m", "training.unlearn"], settings, tmp_path / "two")
    assert len(one["history"]) == 3 and ("retain_weight" in one["history"][-1]) == (method == "pdu_rt")
    for ours, theirs in zip(one["history"], two["history"], strict=True):
        numbers = {name: value for name, value in ours.items() if value is not None}
        assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    start = load_file(base / "model.safetensors")
    for name, before in start.items():
        moved = (weights[0][name] - before).abs().max()
        assert (weights[0][name] - weights[1][name]).abs().max() <= 0.02 * moved


def test_shares_are_the_batch(monkeypatch):
    examples = [Example([1, 5, 6], [-100, i, i + 1]) for i in range(5)]
    taken = []
    for rank in range(3):
        state = type("State", (), {"process_index": rank, "num_processes": 3})
        monkeypatch.setattr(distributed, "PartialState", state)
        mine, rows = distributed.share(examples, [4, 0, 2, 3])
        taken += mine
        assert rows == [examples[i] for i in mine]
        _, (row,) = distributed.share(examples, [4])
        assert sum(label >= 0 for label in row.labels) == (2 if rank == 0 else 0)
        assert row.input_ids == examples[4].input_ids
    assert sorted(taken) == [0, 2, 3, 4]


def test_alone_a_sum_over_processes_is_what_it_was():
    assert torch.equal(distributed.total(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
