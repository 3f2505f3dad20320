"""The command on the published logs, to 1e-9, and on a model: its log against the logits and single generations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.eval_sets import load_eval_sets
from training.benchmarks.tofu.log import SETS, read_log
from training.commands.evaluate import EvaluateOptions, main
from training.commands.options import build
from training.generation import complete

DATA_DIR = Path(os.environ.get("NPO_DATA_DIR", Path(__file__).parents[3] / "shared/data"))
LOGS = [DATA_DIR / "eval_logs" / f"{name}_retain99_phi.json" for name in ("npo", "tofu")]
published = pytest.mark.skipif(
    not all(log.is_file() for log in LOGS), reason="no eval_logs in NPO_DATA_DIR or ../shared/data"
)
COMPONENTS = {f"{s}_{m}" for s in ("retain", "ra", "wf", "forget") for m in ("prob", "rougeL", "tr")}


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "training.evaluate", *map(str, arguments)]
    return subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True)


@published
def test_published_logs_to_1e_9():
    done = command("--from_log", LOGS[0], "--retain_log", LOGS[1], "--json")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["model_utility_geometric"] == pytest.approx(0.52026913685764653, abs=1e-9)
    assert result["model_utility_arithmetic"] == pytest.approx(0.50066217565702764, abs=1e-9)
    assert result["forget_quality"] == pytest.approx(0.91880522141211673, abs=1e-9)
    assert result.keys() >= COMPONENTS
    other = main(*build(EvaluateOptions, from_log=LOGS[1], retain_log=LOGS[0], json=True))
    assert other["model_utility_geometric"] == pytest.approx(0.51820081792739647, abs=1e-9)
    assert other["forget_quality"] == result["forget_quality"]


@published
def test_rouge_of_the_published_generations():
    """The recalls in the logs are those of `rouge-score`, with what a model says after its answer."""
    from training.metrics import rouge

    for path in LOGS:
        examples = read_log(path).sets["forget"]
        texts = examples.texts("generation"), examples.texts("answer")
        ours = [rouge(answer, text)["rougeL_recall"] for text, answer in zip(*texts, strict=True)]
        assert ours == examples.fields["rougeL_recall"]


def test_refusals_end_the_command(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("{}")
    for arguments, reason in (
        (("--from_log", path, "--json"), "expected an object with the sets eval_log.json"),
        (("--json",), "expected either --from_log LOG or --model DIR, got neither"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == "" and reason in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def data_dir(tmp_path, corpus):
    """TOFU's evaluation files in its schema, in miniature."""
    wrong = [row["answer"] for row in corpus.rows]
    for file, start, num_wrong in (
        ("retain_perturbed", 0, 5),
        ("real_authors_perturbed", 3, 3),
        ("world_facts_perturbed", 7, 3),
        ("forget10_perturbed", 60, 5),
    ):
        rows = [
            dict(row, perturbed_answer=wrong[-num_wrong - i :][:num_wrong])
            for i, row in enumerate(corpus.rows[start:][:5], 1)
        ]
        if num_wrong == 5:
            rows = [dict(row, paraphrased_answer=f"In short: {row['answer']}") for row in rows]
        (tmp_path / f"{file}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_model_is_evaluated(tmp_path, data_dir, corpus, model, capsys):
    for weight in model.parameters():  # larger than at the start of training, so that answers depend on the questions
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "model")
    corpus.tokenizer.save_pretrained(tmp_path / "model")
    chosen = build(
        EvaluateOptions,
        model=tmp_path / "model",
        data_dir=data_dir,
        out=tmp_path / "out",
        eval_rows=4,
        eval_batch_size=3,
        max_new_tokens=6,
        layout="indexed",
        json=True,
        device="cpu",
    )
    result = main(*chosen)
    assert json.loads(capsys.readouterr().out) == result
    assert result.keys() >= COMPONENTS | {f"{s}_extraction_strength" for s in SETS}
    log_path = tmp_path / "out" / "eval_log_aggregated.json"
    again = main(*build(EvaluateOptions, from_log=log_path, retain_log=log_path))
    assert again.pop("forget_quality") == 1.0
    assert again == {k: v for k, v in result.items() if k != "forget_quality"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{result['forget_prob']:.3g}" in report and str(tmp_path) not in report

    log, sets = read_log(log_path), load_eval_sets(data_dir, 10, 4)
    model.eval()
    for name, rows in sets.items():
        fields = log.sets[name].fields
        for i, row in enumerate(rows):
            answers = [row.answer, row.paraphrased or row.answer, *row.perturbed]
            losses, hits = zip(*(by_logits(model, corpus.format, row.question, a) for a in answers), strict=True)
            logged = [fields["avg_gt_loss"][i], fields["avg_paraphrased_loss"][i], *fields["average_perturb_loss"][i]]
            np.testing.assert_allclose(logged, losses, rtol=1e-5)
            assert fields["exact_memorization"][i] == pytest.approx(hits[0])
            text = complete(model, corpus.format, row.question, max_new_tokens=6)  # without padding
            assert fields["generated_text"][i][1] == text


def test_the_template_is_chosen(tmp_path, data_dir, corpus, model):
    """Prompts and losses are of the template asked for, or of the tokenizer's own chat template."""
    turns = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    corpus.tokenizer.chat_template = turns
    try:
        model.save_pretrained(tmp_path / "model")
        corpus.tokenizer.save_pretrained(tmp_path / "model")
    finally:
        corpus.tokenizer.chat_template = None
    options = {"model": tmp_path / "model", "data_dir": data_dir, "eval_rows": 2, "max_new_tokens": 2, "device": "cpu"}
    logs = {}
    for template in ("auto", "llama-2", "plain"):
        main(*build(EvaluateOptions, **options, template=template, out=tmp_path / template))
        logs[template] = read_log(tmp_path / template / "eval_log_aggregated.json").sets["forget"]
    question = corpus.rows[60]["question"]
    assert logs["auto"].texts("prompt")[0] == f"[INST] {question} [/INST]"
    assert logs["plain"].texts("prompt")[0] == f"Question: {question}\nAnswer:"
    assert logs["auto"].fields == logs["llama-2"].fields
    assert logs["auto"].fields["gt_loss"] != logs["plain"].fields["gt_loss"]
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["settings"]["template"] == "plain"


def by_logits(model, format, question, answer):
    """(mean loss a token with <eos>, share of the answer's tokens that are the most likely ones without it)"""
    (example,) = format.encode([{"question": question, "answer": answer}])
    labels = torch.tensor([example.labels])
    with torch.no_grad():
        out = model(torch.tensor([example.input_ids]), labels=labels)
    scored = labels[0, 1:] != -100
    hits = (out.logits[0, :-1].argmax(-1) == labels[0, 1:])[scored]
    return out.loss.item(), hits[:-1].float().mean().item()


def test_a_dry_run_says_what_would_be_run(tmp_path, data_dir, corpus, model, capsys):
    model.save_pretrained(tmp_path / "model")
    main(*build(EvaluateOptions, model=tmp_path / "model", data_dir=data_dir, eval_rows=4, dry_run=True, device="cpu"))
    printed = json.loads(capsys.readouterr().out)
    assert printed["evaluated"] == dict.fromkeys(SETS, 4) | {"holdout": 0} and printed["eval_rows"] == 4
    assert not (tmp_path / "out").exists()


def test_absent_evaluation_files_are_named(data_dir):
    (data_dir / "forget10_perturbed.json").rename(data_dir / "forget05_perturbed.json")
    with pytest.raises(FileNotFoundError, match=r"forget10_perturbed.json is not in .* has forget05_perturbed.json"):
        load_eval_sets(data_dir, 90, 0)


def test_an_evaluation_is_found_and_another_one_not_replaced(tmp_path, data_dir, corpus, model, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    corpus.tokenizer.save_pretrained(tmp_path / "model")
    options = {"model": tmp_path / "model", "data_dir": data_dir, "eval_rows": 2, "max_new_tokens": 2, "device": "cpu"}
    first = main(*build(EvaluateOptions, **options, out=tmp_path / "out"))
    log = tmp_path / "out" / "eval_log_aggregated.json"
    with monkeypatch.context() as patch:
        patch.setattr(TOFU, "evaluate", None)  # nothing is evaluated again
        assert main(*build(EvaluateOptions, **options, out=tmp_path / "out")) == first
    other = options | {"template": "phi-npo-repo"}
    for changed in (other, options | {"retain_log": log}):
        with pytest.raises(ValueError, match="holds a run with other settings"):
            main(*build(EvaluateOptions, **changed, out=tmp_path / "out"))
    with pytest.raises(ValueError, match="of no run; choose another folder"):
        main(*build(EvaluateOptions, **options, out=tmp_path / "model", fresh=True))
    assert main(*build(EvaluateOptions, **other, out=tmp_path / "out", fresh=True)) != first


@published
@pytest.mark.parametrize("path", LOGS)
def test_a_published_log_in_the_names_of_open_unlearning(path, tmp_path):
    """Its formulas on what it writes give what we report."""
    options = {"from_log": path, "retain_log": LOGS[0], "out": tmp_path, "format": "open_unlearning"}
    result = main(*build(EvaluateOptions, **options))
    written, summary = (json.loads((tmp_path / f"TOFU_{part}.json").read_text()) for part in ("EVAL", "SUMMARY"))
    assert summary == {k: v for k, v in summary.items() if v == written[k]["agg_value"]} and len(summary) >= 5
    nine = [written[f"{s}_Q_A_ROUGE"]["agg_value"] for s in ("retain", "ra", "wf")]
    nine += [written[f"{s}_Truth_Ratio"]["agg_value"] for s in ("retain", "ra", "wf")]
    nine += [written[k]["agg_value"] for k in ("retain_Q_A_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised")]
    assert summary["model_utility"] == pytest.approx(9 / sum(1 / x for x in nine), rel=1e-6)
    assert summary["model_utility"] == result["model_utility_geometric"]
    assert summary["forget_quality"] == result["forget_quality"]
    assert summary["forget_truth_ratio"] == pytest.approx(result["forget_tr"], rel=1e-6)
    rows = written["forget_Q_A_PERT_Prob"]["value_by_index"]
    assert list(rows) == [str(i) for i in range(len(rows))] and len(rows["0"]["avg_loss"]) == len(rows["0"]["prob"]) > 1


def test_membership_attacks_go_through_the_log(tmp_path, data_dir, corpus, model):
    """Against the scores of each row by itself; a log that was read gives the numbers of one that was made."""
    from training import membership
    from training.scoring import answer_scores

    model.save_pretrained(tmp_path / "model")
    corpus.tokenizer.save_pretrained(tmp_path / "model")
    holdout = [{"question": "Who wrote it?", "answer": "x" * i} for i in range(1, 7)]
    (data_dir / "holdout10.json").write_text("".join(json.dumps(row) + "\n" for row in holdout))
    options = {"data_dir": data_dir, "max_new_tokens": 2, "device": "cpu", "eval_rows": 5, "mia_gradnorm": True}
    result = main(*build(EvaluateOptions, model=tmp_path / "model", out=tmp_path / "out", **options))
    log = tmp_path / "out" / "eval_log_aggregated.json"
    rows = [{"question": r.question, "answer": r.answer} for r in load_eval_sets(data_dir, 10, 5)["forget"]]
    found = []
    for some in (rows, holdout[:5]):
        examples = corpus.format.encode(some)
        alone = [answer_scores(model, [example], 0)[0] for example in examples]
        found.append(
            membership.attacks_of([membership.scores(a, r["answer"]) for a, r in zip(alone, some, strict=True)])
        )
    for key, value in membership.summary(*found).items():
        assert result[key] == pytest.approx(value, rel=1e-4), key
    assert 0 <= result["mia_gradnorm"] <= 1
    read = main(*build(EvaluateOptions, from_log=log, retain_log=log, format="open_unlearning", out=tmp_path / "ou"))
    assert read["mia_reference"] == 0.5 and abs(read["privleak"]) < 1e-6
    assert {k: v for k, v in read.items() if k in result and k.startswith("mia_")} == {
        k: v for k, v in result.items() if k.startswith("mia_")
    }
    written = json.loads((tmp_path / "ou" / "TOFU_EVAL.json").read_text())
    assert written["mia_min_k"]["auc"] == result["mia_min_k"]
    assert len(written["mia_loss"]["holdout"]["value_by_index"]) == 5
    strengths = [entry["score"] for entry in written["extraction_strength"]["value_by_index"].values()]
    fields = read_log(log).sets["forget"].fields
    for ours, theirs, n in zip(fields["extraction_strength"], strengths, fields["num_token_gt"], strict=True):
        assert theirs == (ours or 1 / (n - 1))
