"""The commands as a user runs them, on a folder of generated authors: results, refusals, dry runs."""

import json
import os
import re
import runpy
import signal
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.alternates import key_of, read_alternates, write_alternates
from training.benchmarks import BENCHMARKS
from training.benchmarks.tofu.log import read_log
from training.commands import (
    alternates,
    attack,
    authors,
    demo,
    evaluate,
    finetune,
    generate,
    graph,
    grid,
    markov,
    page,
    show_rows,
    subset,
    synthetic,
    tiny,
    unlearn,
)
from training.commands.options import build, parse
from training.commands.presets import PRESETS
from training.interruption import Interrupted
from training.methods import METHODS
from training.model import load_model
from training.templates import Format
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `data`, and a model `full` that has learned a little of it."""
    home = tmp_path_factory.mktemp("commands")
    authors.main(authors.AuthorsOptions(out=home / "data", authors=20, seed=0))
    data = str(home / "data")
    tiny.main(*build(tiny.TinyOptions, data_dir=data, out=home / "base", vocab_size=600, hidden_size=64))
    finetune.main(
        *build(finetune.FinetuneOptions, preset="tiny", model=str(home / "base"), data_dir=data, out=home / "full",
               device="cpu", split="forget20", epochs=2, lr=5e-3, world=True)
    )  # fmt: skip
    return home


def options(home, out, **changed):
    """(options, benchmark)"""
    return build(
        unlearn.UnlearnOptions,
        **{"preset": "tiny", "model": str(home / "full" / "model"), "data_dir": str(home / "data"), "out": out,
           "device": "cpu", "forget_percent": 5, "batch_size": 8, "epochs": 2, "eval_rows": 8, "max_new_tokens": 4,
           "method": "npo_rt", **changed}
    )  # fmt: skip


def files_without_paths(folder, home):
    return all(str(home) not in path.read_text() for path in folder.glob("*.*") if path.suffix in (".json", ".md"))


def test_finetuning_leaves_a_model_that_loads(home):
    out = home / "full"
    files = {"run.json", "options.yaml", "config.json", "metrics.json", "report.md", "figure.png", "model"}
    assert files == {path.name for path in out.iterdir()}
    losses = [h["train_loss"] for h in json.loads((out / "metrics.json").read_text())["history"][1:]]
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(out / "model")
    card = (out / "model" / "README.md").read_text()
    assert "Unlearning is no guarantee" in card and "| `split` | forget20 |" in card
    assert files_without_paths(out, home)


@pytest.mark.parametrize("method", ["npo_rt", "dpo_kl", "kto", "ga"])
def test_unlearning_writes_everything(method, home, tmp_path):
    metrics = unlearn.main(*options(home, tmp_path, method=method))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    files = {"run.json", "options.yaml", "config.json", "metrics.json", "report.md", "figure.png", "model", "eval"}
    assert {p.name for p in tmp_path.iterdir()} == files | ({"reference"} if method != "ga" else set())
    assert [h["step"] for h in metrics["history"]] == [0, 3, 6]
    before, *_, after = metrics["history"]
    assert after["forget_prob"] < before["forget_prob"]
    log = read_log(tmp_path / "eval" / "step-000006.json")
    assert len(log.sets["forget"]) == 8 and log.sets["forget"].texts("generation")
    report = (tmp_path / "report.md").read_text()
    assert METHODS[method].label in report and "Unlearning is no guarantee" in report
    assert files_without_paths(tmp_path, home)
    assert metrics["step_zero"] is None if method == "ga" else metrics["step_zero"]["max_abs_log_ratio"] < 1e-3
    assert (len(list((tmp_path / "reference").glob("idk_*"))) > 0) == (method in ("dpo_kl", "kto"))


def test_a_finished_run_is_found_and_another_one_refused(home, tmp_path, monkeypatch):
    first = unlearn.main(*options(home, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(unlearn, "run", None)  # nothing is trained again
        assert unlearn.main(*options(home, tmp_path, save_steps=1, device="auto")) == first
    with pytest.raises(ValueError, match="holds a run with other settings"):
        unlearn.main(*options(home, tmp_path, beta=0.2))
    again = unlearn.main(*options(home, tmp_path, beta=0.2, fresh=True))
    assert again["history"][-1] != first["history"][-1]


def test_an_unfinished_run_is_not_thrown_away_by_another(home, tmp_path, monkeypatch):
    """Out of memory, or stopped, and then other settings in the same folder."""
    step = Trainer.step

    def stopped(self, passes, number, after_pass):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, passes, number, after_pass)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "step", stopped)
        unlearn.main(*options(home, tmp_path))
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-000003"]
    with pytest.raises(ValueError, match="holds a run with other settings"):
        unlearn.main(*options(home, tmp_path, micro_batch_size=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept
    taken = []

    def counted(self, passes, number, after_pass):
        taken.append(number)
        return step(self, passes, number, after_pass)

    monkeypatch.setattr(Trainer, "step", counted)
    unlearn.main(*options(home, tmp_path, fresh=True))  # of an unfinished run it takes nothing away
    assert taken == [4, 5, 6]


def test_fresh_removes_what_runs_write_and_nothing_else(home, tmp_path):
    out = tmp_path / "out"
    unlearn.main(*options(home, out, eval_steps=0))
    (out / "notes.txt").write_text("mine")
    unlearn.main(*options(home, out, eval_steps=0, epochs=1, fresh=True))
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (out / "eval").iterdir()) == ["step-000000.json", "step-000003.json"]
    with pytest.raises(ValueError, match=r"would remove .*model, which this run needs"):
        unlearn.main(*options(home, out, model=str(out / "model"), fresh=True))
    assert (out / "model" / "model.safetensors").exists()


def test_logs_and_rows_of_the_evaluation_belong_to_a_run(home, tmp_path):
    start = {name: home / f"{name}.json" for name in ("log", "copy", "other")}
    out = tmp_path / "out"

    def run(out=out, **changed):
        return unlearn.main(*options(home, out, eval_steps=0, **changed))

    run(tmp_path / "first")
    content = json.loads((tmp_path / "first" / "eval" / "step-000000.json").read_text())
    for name in ("log", "copy"):
        start[name].write_text(json.dumps(content))
    content["eval_log_forget.json"]["avg_paraphrased_loss"][0] += 1.0
    del content["sha256"]  # of what it was
    start["other"].write_text(json.dumps(content))
    first = run(retain_log=start["log"], start_log=start["log"])
    assert first["history"][0]["forget_quality"] == pytest.approx(1.0)  # of a log against itself
    assert run(retain_log=start["copy"], start_log=start["copy"]) == first
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(retain_log=start["other"], start_log=start["log"])
    with pytest.raises(ValueError, match="--start_log: expected a log of the 7 rows"):
        run(tmp_path / "fewer", start_log=start["log"], eval_rows=7)


def test_a_model_that_was_not_saved_is_not_finished(home, tmp_path):
    unlearn.main(*options(home, tmp_path, save_model=False, eval_steps=0))
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        unlearn.main(*options(home, tmp_path, eval_steps=0))


def test_a_model_keeps_the_template_it_was_trained_with(home, tmp_path):
    unlearn.main(*options(home, tmp_path, template="phi-npo-repo", eval_steps=0))
    assert Format(AutoTokenizer.from_pretrained(tmp_path / "model")).template == "phi-npo-repo"
    assert Format(AutoTokenizer.from_pretrained(home / "full" / "model")).template == "plain"


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(home, tmp_path):
    with pytest.raises(ValueError, match="gradients' norm"):
        unlearn.main(*options(home, tmp_path, method="ga", lr=1e30, save_steps=1, max_grad_norm=0.0))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000001", "checkpoint-000002"]


def test_without_clipping_gradients_are_what_they_are(home, tmp_path):
    first, second = (
        unlearn.main(*options(home, tmp_path / str(norm), max_grad_norm=norm, eval_steps=0)) for norm in (0.0, 1e9)
    )
    assert first["history"] == second["history"]
    assert first["history"][-1]["forget_prob"] < first["history"][0]["forget_prob"]


COMMANDS = {
    "attack": attack.AttackOptions, "authors": authors.AuthorsOptions, "demo": demo.DemoOptions,
    "evaluate": evaluate.EvaluateOptions, "finetune": finetune.FinetuneOptions, "graph": graph.GraphOptions,
    "grid": grid.GridOptions, "markov": markov.MarkovOptions, "page": page.PageOptions,
    "generate": generate.GenerateOptions, "show_rows": show_rows.ShowRowsOptions,
    "subset": subset.SubsetOptions, "synthetic": synthetic.SyntheticOptions, "tiny": tiny.TinyOptions,
    "unlearn": unlearn.UnlearnOptions,
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, monkeypatch, capsys):
    """`python -m training.NAME --help` says what the command does, shows how it is called, and lists its options."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"training.{name}", run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python -m training.{name}" in said.replace(f"usage: python -m training.{name}", "")
    assert all(f"--{field.name}" in said or field.name == "attack" for field in fields(COMMANDS[name]))


# Files, and how many commands they have at least, indented or in a block of their own.
DOCUMENTED = {"training/README.md": 4, "docs/guides/tofu.md": 15, "docs/guides/lora.md": 1}


@pytest.mark.parametrize("file", DOCUMENTED)
def test_the_commands_of_the_documentation_parse(file):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?python -m training\.(\w+) ([^#\n]*)", text, flags=re.MULTILINE)
    assert len(lines) >= DOCUMENTED[file]
    for name, arguments in lines:
        arguments = re.sub(r"\[.*?\]", "", arguments)  # what may be left out
        assert parse(COMMANDS[name], f"training.{name}", "", arguments.split())


def test_a_reference_of_another_model_is_refused(home, tmp_path):
    shared = tmp_path / "reference"
    unlearn.main(*options(home, tmp_path / "a", reference_cache=shared, save_model=True))
    with pytest.raises(ValueError, match="computed with another model"):
        unlearn.main(*options(home, tmp_path / "b", reference_cache=shared, model=str(tmp_path / "a" / "model")))
    unlearn.main(*options(home, tmp_path / "b", reference_cache=shared))


@pytest.mark.parametrize("method", ["undial", "rmu", "adaptive_rmu_kl", "pdu_rt", "tnpo_rt"])
def test_methods_that_cache_more_steer_or_keep_a_state_run(method, home, tmp_path):
    """The answer probability falls; the weights above a steered layer stay."""
    given = {"lr": 3e-3, "reference_cache": tmp_path / "reference"}
    if method == "pdu_rt":
        given |= {"dual_warmup_epochs": 0.0, "retain_weight": 0.1, "dual_lr": 0.01}
    out = tmp_path / "out"
    metrics = unlearn.main(*options(home, out, method=method, **given))
    history = metrics["history"]
    assert history[-1]["forget_prob"] < history[0]["forget_prob"]
    cached = {path.name for path in (tmp_path / "reference").glob("*")}
    names = {"undial": {"forget05_hidden.safetensors"}, "tnpo_rt": {"forget05_token_logps.safetensors"}}
    assert cached == names.get(method, set())
    assert ("retain_weight" in history[-1]) == (method == "pdu_rt")
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (home / "full", out))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == ({"model.norm.weight"} if method == "rmu" else set())


def test_only_the_parameters_of_a_pattern_are_trained(home, tmp_path):
    unlearn.main(*options(home, tmp_path, method="ga", lr=1e-2, train_only=r".*mlp\.down_proj\.weight"))
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (home / "full", tmp_path))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"model.layers.0.mlp.down_proj.weight"}
    with pytest.raises(ValueError, match="--train_only lm: no parameter has such a name; there are model"):
        unlearn.main(*options(home, tmp_path / "b", method="ga", train_only="lm"))


def test_alternates_are_made_once_and_preferred(home, tmp_path):
    """By the model itself, at a high temperature; AltPO without any says where they come from."""
    file = tmp_path / "alternates.jsonl"
    made = {"model": home / "full" / "model", "data_dir": home / "data", "forget_percent": 5, "out": file, "count": 2,
            "temperature": 3.0, "max_new_tokens": 6, "device": "cpu"}  # fmt: skip
    assert alternates.main(*build(alternates.AlternatesOptions, **made)) == file
    key, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert list(key) == ["key"] and len(lines) == 20 and all(1 <= len(line["alternates"]) <= 2 for line in lines)
    text = file.read_text()
    alternates.main(*build(alternates.AlternatesOptions, **made))
    with pytest.raises(ValueError, match="holds answers of other settings"):
        alternates.main(*build(alternates.AlternatesOptions, **made, seed=1))
    assert file.read_text() == text  # until --fresh says so
    alternates.main(*build(alternates.AlternatesOptions, **made, fresh=True))
    assert file.read_text() == text  # of the same seed
    metrics = unlearn.main(*options(home, tmp_path / "out", method="altpo_rt", alternates=file, lr=1e-3))
    assert (
        metrics["rows"]["alternate"] >= 20
        and metrics["history"][-1]["forget_prob"] < metrics["history"][0]["forget_prob"]
    )
    with pytest.raises(ValueError, match=r"expected --alternates, a file of python -m training\.alternates"):
        unlearn.main(*options(home, tmp_path / "none", method="altpo_rt"))
    file.write_text("\n".join(text.splitlines()[:3]))
    with pytest.raises(ValueError, match="expected alternates for every question, found none for"):
        unlearn.main(*options(home, tmp_path / "none", method="altpo_rt", alternates=file))
    for line, message in (
        ("{}", "line 1: expected"),
        ('{"question": "q", "alternates": "an answer"}', "expected a list of answers with text, got 'an answer'"),
        ('{"question": "q", "alternates": [" "]}', "expected a list of answers with text"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=message):
            unlearn.main(*options(home, tmp_path / "none", method="altpo_rt", alternates=file))


def test_alternates_are_read_as_they_were_written(tmp_path):
    """Whatever characters end a line elsewhere; blank lines are none."""
    rows = [{"question": "a\x85b", "answer": ""}, {"question": "c", "answer": ""}]
    answers = [["one\u2028two", "three\nfour"], ["five"]]
    write_alternates(tmp_path / "file", rows, answers, "of this")
    assert key_of(tmp_path / "file") == "of this"
    assert read_alternates(tmp_path / "file", rows) == answers
    with (tmp_path / "file").open("a") as file:
        file.write("\n  \n")
    assert read_alternates(tmp_path / "file", rows[1:]) == answers[1:]
    by_hand = (tmp_path / "file").read_text().split("\n", 1)[1]
    (tmp_path / "file").write_text(by_hand)
    assert read_alternates(tmp_path / "file", rows) == answers and key_of(tmp_path / "file") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "rmu", "layer": 99}, "--layer: the model has decoder layers 0 to 0, got 99"),
        ({"method": "dipo", "top_k": 600}, "--top_k: expected less than the vocabulary of 600, got 600"),
        ({"method": "undial", "published_rows": "on", "packing": "on"}, "--published_rows: .* expected --packing off"),
        ({"method": "undial", "compat": "open-unlearning", "packing": "on"}, "expected --packing off"),
        ({"method": "ceu", "skip_tokens": 500}, "--skip_tokens 500 leaves no token of the forget set"),
        ({"method": "pdu", "published_rows": "yes"}, "--published_rows: expected one of auto, on, off, got 'yes'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(given, message, home, tmp_path):
    with pytest.raises(ValueError, match=message):
        unlearn.main(*options(home, tmp_path / "out", dry_run=True, **given))
    assert not (tmp_path / "out").exists()


def test_the_copy_of_the_head_counts_in_a_dry_run(home, tmp_path, capsys):
    def held(**given):
        unlearn.main(*options(home, tmp_path / "out", dry_run=True, **given))
        return json.loads(capsys.readouterr().out)["memory_estimate_gib"]["reference"]

    weight = AutoModelForCausalLM.from_pretrained(home / "full" / "model").lm_head.weight
    assert held(method="undial") == round(weight.numel() * 4 / 2**30, 3) or weight.numel() < 2**17
    assert held(method="undial", lora_rank=2) == held(method="npo") == 0


def test_the_list_of_methods_has_sources_and_costs(home, tmp_path, capsys):
    unlearn.main(*options(home, tmp_path, list=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS] and len(METHODS) > 50
    (line,) = (line for line in lines if line.startswith("catnip "))
    assert "3 products; no reference" in line and "arXiv 2602.02824, reconstructed" in line


def test_adapters_share_the_references_of_the_model_they_sit_on(home, tmp_path):
    for rank, seed in ((0, 0), (2, 1), (4, 2)):
        run = options(home, tmp_path / f"{rank}", lora_rank=rank, seed=seed, reference_cache=tmp_path / "reference")
        assert unlearn.main(*run)["step_zero"]["max_abs_log_ratio"] < 1e-3


def test_adapters_are_trained_and_merged(home, tmp_path):
    metrics = unlearn.main(*options(home, tmp_path, lora_rank=4, lr=1e-2, packing="on"))
    assert metrics["history"][-1]["forget_prob"] < metrics["history"][0]["forget_prob"]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (home / "full", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and before.keys() == after.keys()
    assert all("_proj" in name for name in changed)  # neither embeddings nor norms
    assert load_model(tmp_path / "model", torch.device("cpu")).num_parameters()


def test_dry_runs_say_what_would_be_run(home, tmp_path, capsys):
    dry = options(home, tmp_path / "out", dry_run=True, micro_batch_size=3)
    assert unlearn.main(*dry) is None
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["beta"] == 0.1 and said["settings"]["lr"] == 3e-4  # the method's, the preset's
    assert said["steps"] == 6 and said["rows"] == {"forget": 20, "retain": 380}
    assert said["effective_batch"] == {"rows": 8, "processes": 1, "micro_batch": 3, "accumulated": 3}
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(home / "full" / "model").parameters())
    memory = said["memory_estimate_gib"]
    assert memory["weights"] == pytest.approx(4 * parameters / 2**30, abs=1e-3)
    assert memory["total"] >= memory["python"] + 3 * memory["weights"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("preset", "stage", "expected"),
    [
        ("llama-2-7b-chat", "finetune", {"epochs": 5, "lr": 1e-5, "batch_size": 32, "template": "llama-2"}),
        ("llama-2-7b-chat", "unlearn", {"epochs": 10, "lr": 1e-5, "batch_size": 32, "micro_batch_size": 8}),
        ("llama-3.2-1b", "unlearn", {"epochs": 10, "lr": 1e-5, "template": "llama-3"}),
        ("phi-1.5", "finetune", {"epochs": 5, "lr": 2e-5, "template": "phi", "weight_decay": 0.01}),
        (None, "unlearn", {"epochs": 10, "lr": 1e-5, "template": "auto"}),
        (None, "finetune", {"epochs": 5}),
    ],
)
def test_presets_are_the_papers(preset, stage, expected):
    kind = {"finetune": finetune.FinetuneOptions, "unlearn": unlearn.UnlearnOptions}[stage]
    chosen, _ = build(kind, preset=preset)
    assert {name: getattr(chosen, name) for name in expected} == expected
    assert build(kind, preset=preset, lr=0.5)[0].lr == 0.5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_options(preset):
    """Of the command, or of the grid and a benchmark that it runs on."""
    of_benchmarks = [benchmark.Options for benchmark in BENCHMARKS.values()]
    finetuning = [finetune.FinetuneOptions, *of_benchmarks]
    names = {"finetune": finetuning, "unlearn": [unlearn.UnlearnOptions, grid.GridOptions, *of_benchmarks]}
    for stage, kinds in names.items():
        given = PRESETS[preset]["both"] | PRESETS[preset].get(stage, {})
        assert set(given) <= {f.name for kind in kinds for f in fields(kind)}


@pytest.mark.parametrize(("compat", "positions"), [("paper", "answer"), ("npo-repo", "all")])
def test_compat_says_where_kl_is_taken_and_who_goes_with_whom(compat, positions, home, tmp_path):
    job = unlearn.Unlearning(*options(home, tmp_path, compat=compat, epochs=3))
    assert job.settings.kl_positions == positions
    partners = {row: set() for row in range(20)}
    for step in job.plan.steps:
        for row, partner in zip(step.forget, step.retain, strict=True):
            partners[row].add(partner)
    assert max(map(len, partners.values())) == (1 if compat == "npo-repo" else 3)
    chosen = options(home, tmp_path, compat=compat, kl_positions="answer")
    assert unlearn.Unlearning(*chosen).settings.kl_positions == "answer"


def test_bad_settings_say_so(home, tmp_path):
    with pytest.raises(ValueError, match="expected --model and --out"):
        unlearn.main(*build(unlearn.UnlearnOptions, out=tmp_path))
    with pytest.raises(ValueError, match="--epochs: expected more than 0"):
        unlearn.main(*options(home, tmp_path, epochs=-1))
    with pytest.raises(ValueError, match="no such folder"):
        unlearn.main(*options(home, tmp_path, model=str(tmp_path / "absent")))
    with pytest.raises(ValueError, match="is the folder of --model"):
        unlearn.main(*options(home, home / "full" / "model", fresh=True))
    with pytest.raises(ValueError, match="expected a folder, got a file"):
        unlearn.main(*options(home, home / "data" / "full.json"))
    with pytest.raises(ValueError, match="--device: expected auto"):
        unlearn.main(*options(home, tmp_path, device="gpu"))
    with pytest.raises(ValueError, match="forget33"):
        unlearn.main(*options(home, tmp_path, forget_percent=33))
