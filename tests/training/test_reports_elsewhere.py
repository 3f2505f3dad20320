"""Bugs reported for other unlearning and training projects, tried here; docs/reports_training.md lists them."""

import copy
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from npo_kernels import fused_npo_loss
from tests.training.conftest import llama
from tests.training.test_eval_log import FORGET, indexed, make_log
from tests.training.test_trainer import assert_equal, trained
from training import checkpoints
from training.benchmarks.authors import Authors, AuthorsOptions
from training.benchmarks.muse.benchmark import MUSE, MuseOptions
from training.benchmarks.tofu.benchmark import TOFU, TofuOptions
from training.benchmarks.tofu.eval_sets import eval_splits, load_eval_sets
from training.benchmarks.tofu.log import LogError, parse_log, read_log, write_log
from training.benchmarks.tofu.summary import headline, summary
from training.benchmarks.wmdp.benchmark import WMDP, WmdpOptions
from training.checkpoints import Checkpoints
from training.commands.evaluate import EvaluateOptions, main
from training.commands.options import build
from training.commands.session import measured, model_fingerprint
from training.commands.unlearn import Unlearning
from training.config import TrainConfig
from training.generation import complete
from training.metrics import log_truth_ratio
from training.model import load_model
from training.pieces import Pieces
from training.reference_cache import check_step_zero, compute_reference
from training.shared_prompts import score_answers
from training.steps import Batches, FinetuningSteps
from training.store import seal, write_json
from training.trainer import Trainer

CPU = torch.device("cpu")
TRAINING = Path(__file__).parents[2] / "training"
OF_THE_DAY = re.compile(
    r"\b(?:time\.(?:time|time_ns|localtime|gmtime|ctime)\b|datetime\.(?:now|utcnow|today)|date\.today|st_[amc]time|get[amc]time)"
)
ITSELF = "has the numbers of the model that is evaluated"


# ---------------------------------------------------------------- forget quality of which model, against which


@pytest.fixture
def logs(tmp_path):
    """Files of a log, of the same in the other layout, and of one of another model."""
    contents = {"log": make_log(), "copy": indexed(make_log()), "other": make_log(seed=1)}
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    return SimpleNamespace(**{name: tmp_path / f"{name}.json" for name in contents})


def evaluated(capsys, log, retain_log):
    """(metrics, what was printed on stderr); stdout always has one JSON object."""
    result = main(*build(EvaluateOptions, from_log=log, retain_log=retain_log, json=True))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == result
    return result, printed.err


def test_a_model_that_is_compared_with_itself_is_told(logs, capsys):
    """The same file, or the same model's numbers in another one."""
    for retain_log in (logs.log, logs.copy):
        result, told = evaluated(capsys, logs.log, retain_log)
        assert result["forget_quality"] == 1.0 and ITSELF in told and told.count("warning") == 1
    result, told = evaluated(capsys, logs.log, logs.other)
    assert 0 < result["forget_quality"] < 1 and told == ""


def test_without_a_retrained_model_there_is_no_forget_quality(logs, capsys):
    result, told = evaluated(capsys, logs.log, None)
    assert result["forget_quality"] is None and told == ""
    assert "no --retain_log to compare with" in headline(result)


def test_a_retain_log_of_a_model_that_learned_the_forget_set_is_told(logs, capsys):
    """As when the fine-tuned model's log is given for the retrained one's: then not to have unlearned is perfect."""
    learned = json.loads(logs.other.read_text())
    learned[FORGET]["avg_gt_loss"] = [0.05] * 6
    learned[FORGET]["gt_loss"] = [0.05 * n for n in learned[FORGET]["num_token_gt"]]
    write_json(logs.other, learned)
    _, told = evaluated(capsys, logs.log, logs.other)
    assert "gives the forget answers a probability of 0.951" in told and told.count("warning") == 1


def test_rows_without_paraphrased_answers_are_refused_before_a_model_is_loaded(tmp_path):
    """As those of forget01, which is not forget01_perturbed."""
    for split in eval_splits(1).values():
        row = {"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c"]}
        write_json(tmp_path / f"{split}.json", row)
        text = (tmp_path / f"{split}.json").read_text()
        (tmp_path / f"{split}.json").write_text(text.replace("\n", ""))
    assert len(load_eval_sets(tmp_path, 1)["forget"]) == 1
    (tmp_path / "forget01_perturbed.json").write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(ValueError, match=r"forget01_perturbed, row 1: expected .*paraphrased_answer is not there"):
        load_eval_sets(tmp_path, 1)


def test_forget_quality_is_that_of_the_forget_set_whatever_the_other_sets_are():
    """A model that learned everything differs from the retrained one, even if both agree on the retain set."""
    log, other = make_log(), make_log(seed=1)
    quality = summary(parse_log(log, "log"), parse_log(other, "retain"))["forget_quality"]
    agreeing = {name: log[name] if name != FORGET else other[name] for name in log}
    assert summary(parse_log(log, "log"), parse_log(agreeing, "retain"))["forget_quality"] == quality < 1


@pytest.mark.parametrize("field", ["num_token_paraphrased", "num_token_perturb", "average_perturb_loss"])
def test_truth_ratios_of_other_answers_do_not_compare(field):
    """The questions are the same, and what the truth is compared with is not: another configuration of the data."""
    other = copy.deepcopy(make_log(seed=1))
    if field == "num_token_paraphrased":
        other[FORGET][field][2] += 1
    elif field == "num_token_perturb":
        other[FORGET][field][2][0] += 1
    else:
        del other[FORGET]["num_token_perturb"]
        other[FORGET][field] = [row[:3] for row in other[FORGET][field]]
    with pytest.raises(LogError, match="perturbed answers"):
        summary(parse_log(make_log(), "log"), parse_log(other, "retain"))


def attacked(model, forget, holdout):
    """A log whose Min-K% scores are those given."""
    content = make_log(seed=model) | {
        "membership_inference": {
            "forget": {"loss": forget, "min_k": forget},
            "holdout": {"loss": holdout, "min_k": holdout},
        }
    }
    return parse_log(content, f"log {model}")


@pytest.mark.parametrize("mistaken", [1, 0], ids=["nearly all", "all"])
def test_privleak_against_a_model_that_recognises_the_forget_set_is_told(mistaken):
    """Its AUC is near 1, so that a ratio to the remaining difference is in the thousands or undefined."""
    forgotten, apart = attacked(0, [9.0] * 10, [1.0] * 10), [1.0] * 9 + [2.0 if mistaken else 1.0]
    retrained = attacked(1, apart, [1.9] * 5 + [3.0] * 5)
    result = summary(forgotten, retrained)
    (told,) = TOFU(TofuOptions(data_dir="demo")).doubts(forgotten, retrained)
    assert result["mia_min_k"] == 0 and "tells the forget rows from others (AUC of Min-K%" in told
    if mistaken:
        assert result["privleak"] > 1000 and "0.950" in told and "divided by 0.05" in told
    else:
        assert result["privleak"] is None and "divided by 0 and is left out" in told
    assert "PrivLeak" in headline(result) if mistaken else "PrivLeak" not in headline(result)
    alike = attacked(1, [1.0, 3.0] * 5, [1.0, 3.0] * 5)
    assert summary(forgotten, alike)["privleak"] == pytest.approx(100.0)
    assert TOFU(TofuOptions(data_dir="demo")).doubts(forgotten, alike) == []


def test_every_benchmark_doubts_a_model_that_is_compared_with_itself():
    scores = [{"loss": x, "min_k": x, "document": "d", "nll": x} for x in (1.0, 2.0)]
    muse = {"forget_privleak": scores, "holdout_privleak": scores}
    wmdp = {"tasks": {"wmdp_bio": scores}, "documents": {"forget": scores, "holdout": scores}}
    authors = {"forget": {"rows": scores}, "holdout": {"rows": scores}}
    apart = [row | {"min_k": row["min_k"] + 9} for row in scores]  # holdout rows of a model that recognises the others
    cases = (
        (MUSE(MuseOptions(data_dir="demo")), muse, muse | {"holdout_privleak": apart}),
        (WMDP(WmdpOptions(data_dir="demo")), wmdp, wmdp | {"documents": {"forget": scores, "holdout": apart}}),
        (Authors(AuthorsOptions()), authors, {"forget": {"rows": scores[:1]}, "holdout": {"rows": apart}}),
    )
    for benchmark, measures, other in cases:
        (itself,) = benchmark.doubts(measures, copy.deepcopy(measures))
        assert ITSELF in itself
        (knows,) = benchmark.doubts(measures, other)
        assert "AUC of Min-K% 1.000" in knows


# ---------------------------------------------------------------- precision, and ruined models


def spread(model):
    """Weights so large that answers differ."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def log_ratios(model, format, groups):
    answers = [format.encode([{"question": q, "answer": a} for a in some]) for q, some in groups]
    scores = score_answers(model, answers, 0)
    means = (-scores.logps.double() / scores.num_tokens).reshape(len(groups), -1).numpy()
    return log_truth_ratio(means[:, 0], means[:, 1:], "geometric")


def exact_log_ratios(model, format, groups):
    """From logits in float64."""
    means = []
    for question, some in groups:
        for example in format.encode([{"question": question, "answer": answer} for answer in some]):
            ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            means.append(-logps[labels != -100].gather(-1, labels[labels != -100, None]).mean().item())
    means = np.array(means).reshape(len(groups), -1)
    return log_truth_ratio(means[:, 0], means[:, 1:], "geometric")


def test_truth_ratios_in_half_precision_are_those_in_float64(tmp_path, corpus, model):
    """Of weights that were saved in float16, and in bfloat16 arithmetic: none is stuck at 1."""
    torch.manual_seed(0)
    spread(model).half().save_pretrained(tmp_path)
    texts = [row["answer"] for row in corpus.rows]
    groups = [(row["question"], texts[i : i + 4]) for i, row in enumerate(corpus.rows[:12])]
    loaded = load_model(tmp_path, CPU, precision="fp32")
    exact = exact_log_ratios(load_model(tmp_path, CPU, precision="fp32").double(), corpus.format, groups)
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(log_ratios(loaded, corpus.format, groups), exact, atol=1e-4 * np.abs(exact).max())
    lower = log_ratios(load_model(tmp_path, CPU, precision="bf16"), corpus.format, groups)
    assert np.abs(exact).min() > 0 and len(set(lower)) == len(groups)
    np.testing.assert_allclose(lower, exact, atol=0.1 * np.std(exact))
    with pytest.raises(ValueError, match="--precision: expected one of auto, fp32, bf16, got 'fp16'"):
        TrainConfig(precision="fp16")


@pytest.mark.filterwarnings("error")
def test_the_log_of_a_ruined_model_is_json(tmp_path):
    """Gradient ascent ends at losses whose ratios are beyond any float; JSON has neither Infinity nor NaN."""
    content = make_log()
    for fields in content.values():
        fields["avg_gt_loss"] = [2000.0] * 6
        fields["avg_paraphrased_loss"] = [3000.0] * 6
    log = replace(parse_log(content, "ruined"), layout="indexed")
    write_log(tmp_path / "log.json", log)

    def refused(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "log.json").read_text(), parse_constant=refused)
    result = summary(read_log(tmp_path / "log.json"), parse_log(make_log(seed=1), "retain"))
    assert all(math.isfinite(value) for value in result.values() if value is not None)
    assert 0 < result["forget_quality"] < 0.05


# ---------------------------------------------------------------- evaluations of different models


@pytest.fixture
def small(corpus):
    """A benchmark of four authors, with the format of the corpus."""
    return build(EvaluateOptions, benchmark="authors", authors=4, forget_percent=25, retain_eval_authors=1)[1]


def key_of_measured(monkeypatch, benchmark, model, format, path):
    """What the pieces of its evaluation are found by; nothing is evaluated."""
    keys = []
    monkeypatch.setattr(type(benchmark), "evaluate", lambda self, m, f, pieces, progress: keys.append(pieces.key) or {})
    measured(benchmark, model, format, path / "log.json", Progress(disable=True))
    return keys[0]


def test_interrupted_evaluations_of_two_models_are_two(small, corpus, model, tmp_path, monkeypatch):
    """With the same weights too: what is in no weight, and the arithmetic, are in the key."""

    def key():
        return key_of_measured(monkeypatch, small, model, corpus.format, tmp_path)

    keys = [key(), key()]
    assert keys[0] == keys[1]
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5e5}
    keys.append(key())
    model.config._attn_implementation = "eager"
    keys.append(key())
    model.autocast_dtype = torch.bfloat16
    keys.append(key())
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    keys.append(key())
    assert len(set(keys)) == 5


def test_the_folder_of_a_model_is_what_is_in_it(tmp_path):
    """Weights, configuration; an adapter's scale, and the model that it sits on."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, config in (
        (base, "config.json"),
        (adapter, "adapter_config.json"),
    ):
        folder.mkdir()
        save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
        (folder / config).write_text(json.dumps({"lora_alpha": 8, "base_model_name_or_path": str(base)}))
    seen = [model_fingerprint(str(base)), model_fingerprint(str(adapter))]
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "base_model_name_or_path": str(base)}))
    seen.append(model_fingerprint(str(adapter)))
    weights = load_file(base / "model.safetensors")
    save_file({"w": weights["w"] + 1}, base / "model.safetensors")
    seen += [model_fingerprint(str(base)), model_fingerprint(str(adapter))]
    assert len(set(seen)) == 5
    (base / "README.md").write_text("not the model")
    assert model_fingerprint(str(base)) == seen[3]


def test_a_classifier_is_what_is_in_its_folder(tmp_path):
    """The same path, with another classifier in it; and the same one at another path."""
    keys = []
    for name, size in (("a", 8), ("a", 16), ("b", 16)):
        BertConfig(hidden_size=size).save_pretrained(tmp_path / name)
        chosen = {"fluency_classifier": tmp_path / name}
        both = TOFU(TofuOptions(data_dir="demo", **chosen)), MUSE(MuseOptions(data_dir="demo", **chosen))
        keys.append(tuple(benchmark.key() for benchmark in both))
    assert keys[0][0] != keys[1][0] and keys[0][1] != keys[1][1] and keys[1] == keys[2]


BENCHMARKS = {
    "authors": lambda: Authors(AuthorsOptions(authors=4, forget_percent=25, retain_eval_authors=1)),
    "tofu": lambda: TOFU(TofuOptions(data_dir="demo", eval_rows=3, max_new_tokens=1)),
    "muse": lambda: MUSE(
        MuseOptions(data_dir="demo", demo_items=3, eval_rows=2, verbmem_tokens=1, knowmem_tokens=1, max_tokens=40)
    ),
    "wmdp": lambda: WMDP(WmdpOptions(data_dir="demo", mmlu=False, questions=1, eval_documents=2, max_tokens=40)),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_start_log_is_of_the_model_that_unlearns(name, corpus):
    """Another model's evaluation of the same rows would stand for what was known before unlearning."""
    benchmark = BENCHMARKS[name]()
    model = llama(corpus)
    log = benchmark.evaluate(model, corpus.format, Pieces("model"), Progress(disable=True))
    session = SimpleNamespace(format=corpus.format, model="runs/full/model")
    job = SimpleNamespace(benchmark=benchmark, start_log=log, session=session)
    examples, losses = benchmark.losses(log, corpus.format, 16)
    assert len(examples) == len(losses) > 1
    Unlearning.check_start_log(job, model)
    with pytest.raises(ValueError, match=r"--start_log: .* of --model runs/full/model; of forget row"):
        Unlearning.check_start_log(job, spread(llama(corpus, seed=1)))


# ---------------------------------------------------------------- training


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path, monkeypatch):
    """The newest is found neither by the text order of names nor by the times of files."""
    loaded = []
    monkeypatch.setattr(checkpoints, "load_state", lambda trainer, folder: loaded.append(folder.name))
    monkeypatch.setattr(checkpoints, "save_state", lambda trainer, folder: None)
    for age, step in enumerate((999_999, 1_000_000, 5)):
        folder = tmp_path / f"checkpoint-{step:06d}"
        folder.mkdir()
        seal(folder, checkpoints.PROGRESS, key="key", step=step, processes=1, record=None)
        os.utime(folder, (2e9 - age, 2e9 - age))  # the clock went back
    kept = Checkpoints(tmp_path, "key")
    assert kept.load(None) == (1_000_000, None, []) and loaded == ["checkpoint-1000000"]
    kept.save(None, 1_000_001, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1000000", "checkpoint-1000001"}


def test_no_decision_depends_on_the_clock_of_the_day(tried):
    """Which may be set back: durations are of the monotonic clock, and times of files are not read."""
    files = sorted(TRAINING.rglob("*.py"))
    found = {path.name: OF_THE_DAY.findall(path.read_text(encoding="utf-8")) for path in files}
    assert len(files) > 100 and {name: asked for name, asked in found.items() if asked} == {}
    tried("files whose clock was looked at", len(files))


@pytest.mark.parametrize("micro", [None, 2])
def test_the_learning_rate_moves_once_a_step(micro, corpus, model):
    """Not once a micro-batch, nor once a process."""
    config = TrainConfig(epochs=1, lr=1e-2, batch_size=8, micro_batch_size=micro, warmup_steps=2)
    job = FinetuningSteps(corpus.retain[:40], config, Batches(0, CPU, False))
    rates = []
    Trainer(model, config, len(job)).train(job, after_step=lambda metrics: rates.append(metrics.lr))
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_what_comes_before_training_draws_no_random_numbers(tmp_path, corpus, model, small):
    """Or dropout would depend on whether references were cached, and on how often the model is evaluated."""
    model.train()
    state = torch.get_rng_state()
    scores = compute_reference(tmp_path / "reference.safetensors", model, corpus.format, corpus.forget)
    check_step_zero(model, corpus.forget, scores.logps, Batches(0, CPU, False), 8, 0.1)
    small.evaluate(model, corpus.format, Pieces("model"), Progress(disable=True))
    complete(model, corpus.format, "Who?", 4)
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_npo_is_of_probabilities_and_not_of_logits():
    """What is added to all logits of a position changes no probability, and so no loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, shift = (torch.randn(*shape, generator=generator) for shape in ((3, 7, 16), (50, 16), (16,)))
    labels = torch.randint(50, (3, 7), generator=generator)
    refs = torch.tensor([-20.0, -25.0, -30.0])
    losses = [
        fused_npo_loss(hidden, weight, labels, ref_logps=refs, beta=0.5, reduction="none", impl=impl)
        for weight in (head, head + shift)
        for impl in ("torch", "reference")
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_at_the_end_of_an_epoch_takes_the_next_one(corpus, tmp_path):
    """A data loader that is at its end has nothing left to give, and the run would be over with half of its steps."""
    whole = trained(corpus)
    with pytest.raises(RuntimeError, match="killed"):
        trained(corpus, tmp_path, kill_at=4, save_every=3)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000003"]
    resumed = trained(corpus, tmp_path)
    assert [entry["step"] for entry in resumed[1]] == list(range(7))
    assert_equal(resumed, whole)
