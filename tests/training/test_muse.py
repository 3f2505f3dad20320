"""MUSE's numbers against a plain version of each, with logits and one row at a time; its commands from end to end."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from training.benchmarks.muse import evaluate as evaluation
from training.benchmarks.muse.benchmark import MUSE, MuseOptions
from training.benchmarks.muse.sets import Asked, Continuation
from training.commands import evaluate, finetune, grid, tiny, unlearn
from training.commands.options import build, parse
from training.model import build_model, special_ids_of
from training.pieces import Pieces
from training.reports.requests import requests_section
from training.store import write_json
from training.templates import Format
from training.tokenizer import train_tokenizer

SHORT = {
    "data_dir": "demo",
    "demo_items": 3,
    "units": "chunks",
    "max_tokens": 48,
    "verbmem_tokens": 9,
    "knowmem_tokens": 6,
}
STOP = ("\n\n", "\nQuestion", "Question:")


@pytest.fixture(scope="module")
def world():
    """The smallest corpus, and a model that half knows what is to be forgotten."""
    muse = MUSE(MuseOptions(**SHORT))
    tokenizer = train_tokenizer(muse.rows("full"), vocab_size=400)
    format = Format(tokenizer, "plain")
    model = build_model(len(tokenizer), 64, 1, special_ids_of(tokenizer), seed=0)
    examples = muse.encode(format, muse.rows("forget"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(45):
        example = examples[step % len(examples)]
        loss = model(torch.tensor([example.input_ids]), labels=torch.tensor([example.input_ids])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return SimpleNamespace(muse=muse, format=format, tokenizer=tokenizer, model=model.eval())


def measured(world, pieces=None, **options):
    muse = MUSE(MuseOptions(**SHORT | options)) if options else world.muse
    return muse.evaluate(world.model, world.format, pieces or Pieces("model"), Progress(disable=True))


@pytest.fixture(scope="module")
def measures(world):
    return measured(world)


# The plain version.


def ids_of(world, text):
    return [world.tokenizer.bos_token_id, *world.tokenizer.encode(text, add_special_tokens=False)]


@torch.no_grad()
def logprobs(world, ids):
    """(n - 1, V) of each token but the first, given those before it."""
    return torch.log_softmax(world.model(torch.tensor([ids])).logits[0, :-1].double(), -1)


@torch.no_grad()
def greedy(world, prompt, most, stop=()):
    ids, new = ids_of(world, prompt), []
    while len(new) < most:
        token = int(world.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == world.tokenizer.eos_token_id:
            break
        new.append(token)
    text = world.tokenizer.decode(new)
    for word in stop:
        text = text.split(word)[0]
    return text


def rouge_f1(reference, text):
    a, b = (re.findall("[a-z0-9]+", t.lower()) for t in (reference, text))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


def min_k(values):
    values = sorted(values)
    return -sum(values[: max(1, int(0.4 * len(values)))]) / max(1, int(0.4 * len(values)))


def auc(forget, holdout):
    wins = sum((f < h) + 0.5 * (f == h) for f in forget for h in holdout)
    return wins / (len(forget) * len(holdout))


def test_verbmem_is_rouge_of_the_continuation(world, measures):
    for row in measures["forget_verbmem"]:
        text = greedy(world, row["prompt"], 9)
        reference = world.tokenizer.decode(ids_of(world, row["gt"])[:9], skip_special_tokens=True)
        assert row["generation"] == text.strip()
        assert row["rougeL_f1"] == pytest.approx(rouge_f1(reference, text))
    found = world.muse.summarize(measures)["forget_verbmem_ROUGE"]
    assert found == pytest.approx(np.mean([row["rougeL_f1"] for row in measures["forget_verbmem"]])) and found > 0.1


def test_memorisation_is_of_the_text_given_its_true_tokens(world, measures):
    for row, given in zip(measures["forget_verbmem"], world.muse.sets.forget_verbmem, strict=True):
        prompt = ids_of(world, given.prompt)
        text = world.tokenizer.encode(given.gt, add_special_tokens=False)[:48]
        assert row["num_tokens"] == len(text)
        text = text[:-1]  # as OpenUnlearning
        predicted = logprobs(world, prompt + text)[len(prompt) - 1 :].argmax(-1).tolist()
        n, hits = len(text), [p == t for p, t in zip(predicted, text, strict=True)]
        fewest = next(k for k in range(n + 1) if all(hits[k:]))
        assert row["exact_memorization"] == pytest.approx(sum(hits) / n)
        assert row["extraction_strength"] == pytest.approx(1 - fewest / n)
    summary = world.muse.summarize(measures)
    assert 0 < summary["exact_memorization"] < 1 and 0 <= summary["extraction_strength"] < 1


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_knowmem_is_rouge_of_the_answer_up_to_the_next_question(part, world, measures):
    rows, given = measures[f"{part}_knowmem"], getattr(world.muse.sets, f"{part}_knowmem")
    for row, asked in zip(rows, given, strict=True):
        text = greedy(world, asked.prompt, 6, STOP)
        assert (row["question"], row["answer"]) == (asked.question, asked.answer)
        assert row["generation"] == text.strip() and row["rougeL_f1"] == pytest.approx(rouge_f1(asked.answer, text))
    mean = np.mean([row["rougeL_f1"] for row in rows])
    assert world.muse.summarize(measures)[f"{part}_knowmem_ROUGE"] == pytest.approx(mean)


def test_privleak_compares_the_auc_of_min_k(world, measures):
    scores = {}
    for part in ("forget", "holdout"):
        scores[part] = []
        for text, row in zip(getattr(world.muse.sets, f"{part}_privleak"), measures[f"{part}_privleak"], strict=True):
            ids = ids_of(world, text)[:48]
            true = logprobs(world, ids)[range(len(ids) - 1), ids[1:]].tolist()
            assert row["loss"] == pytest.approx(-np.mean(true), rel=1e-5)
            assert row["min_k"] == pytest.approx(min_k(true[:-1]), rel=1e-5)  # OpenUnlearning drops the last
            scores[part].append(row["min_k"])
    value = auc(scores["forget"], scores["holdout"])
    summary = world.muse.summarize(measures)
    assert summary["mia_min_k"] == pytest.approx(value) and value > 0.5
    assert summary["privleak"] == pytest.approx(((1 - value) - 0.5) / 0.5 * 100)
    again = {part: [{**row, "min_k": -row["min_k"]} for row in measures[part]] for part in measures if "leak" in part}
    other = 1 - value  # of the retrained model
    against = world.muse.summarize(measures, measures | again)["privleak"]
    assert against == pytest.approx(((1 - value) - (1 - other)) / (1 - other + 1e-10) * 100)
    assert world.muse.summarize(measures | again, measures | again)["privleak"] == 0
    assert value < 1 or world.muse.summarize(measures, measures)["privleak"] is None  # nothing to divide by


def test_forgotten_rises_as_less_is_said(world, measures):
    summary = world.muse.summarize(measures)
    mean = (summary["forget_verbmem_ROUGE"] + summary["forget_knowmem_ROUGE"]) / 2
    assert summary["forgotten"] == pytest.approx(1 - mean)
    assert world.muse.trade_off.forgetting in summary and world.muse.trade_off.utility in summary
    assert {key for key in world.muse.columns if not key.startswith(("mia_g", "mia_r", "forget_cl"))} <= summary.keys()


def test_open_unlearning_s_rouge_is_stemmed_and_of_the_whole_text(world):
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rows = measured(world, rouge="open-unlearning")["forget_verbmem"]
    for row in rows:
        assert row["rougeL_f1"] == scorer.score(row["gt"], row["generation"])["rougeL"].fmeasure


def test_a_space_at_the_end_of_the_prompt_is_asked_for_or_left_out(world):
    texts = [row["generation"] for row in measured(world, trailing_space=False)["forget_knowmem"]]
    given = [greedy(world, asked.prompt.removesuffix(" "), 6, STOP) for asked in world.muse.sets.forget_knowmem]
    assert texts == [text.strip() for text in given]


def with_sets(world, **changed):
    """The benchmark on other evaluation sets, of one row each where they are not given."""
    muse = MUSE(MuseOptions(**SHORT))
    muse.sets = type(world.muse.sets)(**{k: changed.get(k, v[:1]) for k, v in world.muse.sets._asdict().items()})
    return muse.summarize(muse.evaluate(world.model, world.format, Pieces("model"), Progress(disable=True)))


def test_single_rows_have_numbers(world):
    summary = with_sets(world)
    assert summary["mia_min_k"] in (0.0, 1.0) and all(math.isfinite(v) for v in summary.values() if v is not None)
    assert -100 <= summary["privleak"] <= 100 + 1e-6


def test_the_same_texts_on_both_sides_cannot_be_told_apart(world):
    texts = world.muse.sets.holdout_privleak
    summary = with_sets(world, forget_privleak=texts, holdout_privleak=texts)
    assert all(summary[f"mia_{name}"] == 0.5 for name in ("loss", "zlib", "min_k", "min_k_plus_plus"))
    assert summary["privleak"] == pytest.approx(0)


def test_texts_without_tokens_do_not_stop_an_evaluation(world):
    summary = with_sets(
        world,
        forget_verbmem=[Continuation("The", "")],
        forget_knowmem=[Asked("Question: Who?\nAnswer: ", "Who?", "")],
        forget_privleak=[""],
        holdout_privleak=["", "a"],
    )
    assert summary["exact_memorization"] is None and summary["extraction_strength"] is None
    assert summary["forget_verbmem_ROUGE"] == summary["forget_knowmem_ROUGE"] == 0 and summary["forgotten"] == 1
    assert 0 <= summary["mia_loss"] <= 1
    assert "None" not in world.muse.headline(summary)


def test_an_interrupted_evaluation_goes_on(world, measures, tmp_path, monkeypatch):
    pieces, calls = Pieces("model", tmp_path / "pieces", "key"), []
    whole = evaluation.generate

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(evaluation, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        measured(world, pieces)
    assert measured(world, pieces) == measures and len(calls) == 4  # the two that were done are not done again
    assert measured(world, Pieces("model", tmp_path / "pieces", "other")) == measures and len(calls) == 7


def test_measures_are_read_and_checked(world, measures, tmp_path):
    path = tmp_path / "measures.json"
    world.muse.write(path, measures)
    assert world.muse.read(path) == measures
    world.muse.check(measures)
    with pytest.raises(ValueError, match=r"measures of the 2 rows of forget_knowmem .* got 1"):
        world.muse.check(measures | {"forget_knowmem": measures["forget_knowmem"][:1]})
    with pytest.raises(ValueError, match="that are not theirs"):
        MUSE(MuseOptions(**SHORT | {"data_seed": 1})).check(measures)
    for content, message in (
        ([], "an object with the sets"),
        ({**measures, "retain_knowmem": []}, "retain_knowmem is not"),
        ({**measures, "holdout_privleak": [{"loss": 1.0}]}, "holdout_privleak, row 1: expected .* zlib is absent"),
    ):
        write_json(path, content)
        with pytest.raises(ValueError, match=message):
            world.muse.read(path)
    path.write_text('{"forget_verbmem": [', encoding="utf-8")
    with pytest.raises(ValueError, match="got no JSON"):
        world.muse.read(path)


def test_open_unlearning_s_files_have_its_names(world, measures):
    summary = world.muse.summarize(measures)
    files = world.muse.open_unlearning(measures, summary)
    log, numbers = files["MUSE_EVAL.json"], files["MUSE_SUMMARY.json"]
    names = "exact_memorization extraction_strength forget_knowmem_ROUGE forget_verbmem_ROUGE mia_loss mia_min_k "
    names += "mia_min_k_plus_plus mia_zlib privleak retain_knowmem_ROUGE"
    assert list(log) == list(numbers) == names.split()
    assert all(numbers[name] == log[name]["agg_value"] for name in numbers)
    as_ours = ("exact_memorization", "mia_min_k", "privleak")
    assert all(numbers[name] == pytest.approx(summary[name]) for name in as_ours)
    theirs = measured(world, rouge="open-unlearning")
    for name in ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"):
        assert numbers[name] == pytest.approx(world.muse.summarize(theirs)[name])
    row = log["forget_knowmem_ROUGE"]["value_by_index"]["0"]
    assert set(row) == {"rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation"}
    assert len(log["mia_min_k"]["forget"]["value_by_index"]) == 3 and log["mia_min_k"]["auc"] == summary["mia_min_k"]
    assert log["extraction_strength"]["value_by_index"]["2"]["score"] is not None


def test_the_table_has_a_line_for_each_number(world, measures):
    headings, rows = world.muse.table(world.muse.summarize(measures))
    assert headings == ["number", "value"] and sorted(r[0] for r in rows if r[0][0] in "PV") == ["PrivLeak", "VerbMem"]


def test_samples_are_short(world, measures):
    shown = world.muse.samples(measures)
    assert [row["set"] for row in shown] == ["forget verbmem"] * 2 + ["forget knowmem"] * 2 + ["retain knowmem"] * 2
    assert all(len(text) < 300 for row in shown for text in row.values())


# The commands.

DEMO = ("--benchmark", "muse", *(f"--{k}={v}" for k, v in (SHORT | {"eval_rows": 2}).items()))
FAST = ("--preset", "tiny", "--device", "cpu", "--batch_size", "8", "--lr", "3e-3", "--epochs", "2")


def run(command, kind, *arguments):
    return command.main(*parse(kind, command.PROG, "", [*DEMO, *map(str, arguments)]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("muse")
    run(tiny, tiny.TinyOptions, "--out", home / "base", "--vocab_size", 400, "--hidden_size", 64)
    return home


def test_commands_run_from_nothing_to_a_report(home, capsys):
    learned = run(finetune, finetune.FinetuneOptions, *FAST, "--model", home / "base", "--out", home / "full")
    texts = MUSE(MuseOptions(**SHORT)).rows("full")
    assert 1 < learned["rows"] != len(texts)  # pieces, not documents
    run(
        finetune,
        finetune.FinetuneOptions,
        *FAST,
        "--model",
        home / "base",
        "--out",
        home / "kept",
        "--split",
        "retrain",
    )
    logs = {}
    for name in ("full", "kept"):
        logs[name] = home / f"{name}_evaluation"
        found = run(evaluate, evaluate.EvaluateOptions, "--model", home / name / "model", "--out", logs[name])
        logs[name] /= evaluate.LOG_FILE
        assert found["privleak"] is not None
    against = run(evaluate, evaluate.EvaluateOptions, "--from_log", logs["full"], "--retain_log", logs["kept"])
    assert {key for key in against if "reference" in key} and against["forgotten"] <= 1
    capsys.readouterr()
    metrics = run(
        unlearn, unlearn.UnlearnOptions, *FAST, "--model", home / "full" / "model", "--out", home / "npo",
        "--method", "npo_rt", "--start_log", logs["full"], "--retain_log", logs["kept"],
    )  # fmt: skip
    assert [entry["epoch"] for entry in metrics["history"]] == [0, 1, 2]
    assert metrics["history"][0]["privleak"] == against["privleak"]
    report = (home / "npo" / "report.md").read_text()
    assert "# Unlearning forget by NPO+RT" in report and "KnowMem, retain" in report
    with pytest.raises(ValueError, match="compares answers to questions"):
        run(unlearn, unlearn.UnlearnOptions, *FAST, "--model", home / "full" / "model", "--out", home / "dpo",
            "--method", "dpo_rt")  # fmt: skip


GRID = ("--methods", "npo", "--seeds", "0", "--hidden_size", "64", "--finetune_epochs", "2", "--eval_steps", "0")


def test_requests_one_after_another_start_where_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: path.write_bytes(b"drawn"))  # most of the time
    arguments = (*FAST, *GRID, "--epochs", 1, "--out", tmp_path, "--forget_sets", "sust_1,sust_2")
    metrics = run(grid, grid.GridOptions, *arguments)
    cells = {run["scenario"]: run for run in metrics["runs"]}
    (_, last), (first, _) = (sorted((tmp_path / name / "npo/seed0/eval").glob("step-*.json")) for name in cells)
    assert json.loads(first.read_text()) == json.loads(last.read_text())
    assert cells["sust_2"]["history"][0] != cells["sust_1"]["history"][0]  # the first request did something
    end = {key: value for key, value in cells["sust_1"]["history"][-1].items() if key in MUSE.columns}
    assert end.items() <= cells["sust_2"]["history"][0].items()
    for cell in cells.values():  # each against the reference of its own model
        assert cell["step_zero"]["max_abs_log_ratio"] < 1e-3
    assert not (tmp_path / "sust_2/npo/seed0/model").exists()  # nothing starts from it
    report = (tmp_path / "report.md").read_text()
    assert "## sust: 2 requests" in report and "each from the model that the one before has left" in report
    assert (tmp_path / "requests_sust.png").exists()
    evaluations = [path.name for path in (tmp_path / "full").glob("evaluation_*")]
    assert evaluations == ["evaluation_sust_1"]  # the sets are the same for all of them
    monkeypatch.setattr(unlearn, "run", None)
    assert run(grid, grid.GridOptions, *arguments) == metrics


def test_a_series_is_a_table_and_a_figure_of_medians(tmp_path):
    """After each request, the number before at its left; what is no series has neither."""
    muse = MUSE(MuseOptions(**SHORT))
    shown = [key for key, column in muse.columns.items() if column.panel]

    def history(value):
        return [dict.fromkeys(shown, 0.5), dict.fromkeys(shown, value)]

    runs = [
        {"scenario": name, "method": "npo", "seed": seed, "history": history(value)}
        for name, values in (("scal_1", (0.1, 0.2, 0.9)), ("scal_2", (0.3, 0.4, 0.31)))
        for seed, value in enumerate(values)
    ]
    start = {name: dict.fromkeys(shown, 0.75) for name in ("scal_1", "scal_2")}
    metrics = {"runs": runs, "start": start, "retrained": {}}
    sections = requests_section(tmp_path, metrics, muse.scenarios("scal_1,scal_2"))
    assert sections[0] == "## scal: 2 requests" and "each alone" in sections[1]
    assert "| NPO | VerbMem | 0.75 | 0.2 | 0.31 |" in sections[-1] and sections[-1].count("\n") == 1 + len(shown)
    assert (tmp_path / "requests_scal.png").read_bytes().startswith(b"\x89PNG")
    assert requests_section(tmp_path, metrics, muse.scenarios("scal_1")) == []
    assert requests_section(tmp_path, metrics, [muse]) == []


def test_larger_and_larger_sets_start_from_the_target_model(tmp_path, capsys):
    arguments = (*FAST, *GRID, "--out", tmp_path, "--forget_sets", "scal_1,scal_2")
    run(grid, grid.GridOptions, *arguments, "--dry_run")
    said = capsys.readouterr().out
    assert "unlearn scal_2/npo/seed0\n" in said and ", from" not in said
    chosen, muse = parse(grid.GridOptions, grid.PROG, "", [*DEMO, *map(str, arguments)])
    made = grid.Grid(chosen, muse)
    for cell in made.cells:
        assert made._start_of(cell, "full", tmp_path) == ("full", tmp_path, tmp_path / "reference")
    sust = grid.Grid(*parse(grid.GridOptions, grid.PROG, "", [*DEMO, *GRID, "--forget_sets", "sust_1,sust_2"]))
    start = sust._start_of(sust.cells[-1], "full", tmp_path)
    assert start == (str(sust.out / "sust_1/npo/seed0/model"), None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--forget_sets", "scal_1,scal_9"), "--forget_sets: expected some of forget, scal_1"),
        (("--forget_sets", "sust_2"), "sust_2 starts from the model that has forgotten sust_1: expected both"),
        (("--forget_sets", "sust_2,sust_1"), "in this order, got sust_2, sust_1"),
        (("--forget_set", "sust_3"), "sust_3 starts from the model that has forgotten sust_2"),
        (("--forget_sets", "scal_1", "--forget_percents", "1"), "got both: they say the same thing"),
    ],
)
def test_requests_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid.Grid(*parse(grid.GridOptions, grid.PROG, "", [*DEMO, *GRID, *arguments]))


def test_a_preset_chooses_the_benchmark():
    options, muse = build(unlearn.UnlearnOptions, preset="muse-books", model="somewhere", out="somewhere else")
    assert isinstance(muse, MUSE) and muse.options.data_dir == "muse-bench/MUSE-Books"
    assert (options.lr_scheduler_type, options.epochs, options.lr, options.batch_size) == ("constant", 10, 1e-5, 32)
    words = ["--preset", "muse-news", "--out", "x", "--forget_set", "scal_4"]
    options, muse = parse(finetune.FinetuneOptions, finetune.PROG, "", words)
    assert (options.model, muse.options.forget_set) == ("meta-llama/Llama-2-7b-hf", "scal_4")
    with pytest.raises(ValueError, match="--preset muse-books names no model"):
        grid.Grid(*build(grid.GridOptions, preset="muse-books"))._start_model()
