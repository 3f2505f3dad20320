"""Both published layouts give the same data and are written back unchanged; anything else is refused with the
reason."""

import copy
import json

import numpy as np
import pytest

from training.benchmarks.tofu.log import (
    SETS,
    EvalLog,
    LogError,
    parse_log,
    read_log,
    require_same_questions,
    warnings,
    write_log,
)
from training.benchmarks.tofu.summary import forget_quality, summary


def make_log(seed: int = 0, rows: int = 6) -> dict:
    """A log in the `lists` layout with losses drawn at random; the same questions for every seed."""
    rng = np.random.default_rng(seed)
    log = {}
    for name, key in SETS.items():
        num_perturbed = 3 if name in ("ra", "wf") else 5
        counts = np.arange(rows) + 4
        gt, paraphrased = rng.uniform(1, 30, (2, rows))
        perturbed = rng.uniform(1, 30, (rows, num_perturbed))
        log[key] = {
            "avg_gt_loss": (gt / counts).tolist(),
            "gt_loss": gt.tolist(),
            "num_token_gt": counts.tolist(),
            "rouge1_recall": rng.uniform(0.5, 1, rows).tolist(),
            "rougeL_recall": rng.uniform(0.1, 0.5, rows).tolist(),
            "average_perturb_loss": (perturbed / counts[:, None]).tolist(),
            "avg_paraphrased_loss": (paraphrased / counts).tolist(),
            "paraphrased_loss": paraphrased.tolist(),
            "perturb_loss": perturbed.tolist(),
            "num_token_paraphrased": counts.tolist(),
            "num_token_perturb": [[c] * num_perturbed for c in counts.tolist()],
            "generated_text": [[f"Question {i}?", f"{name} it is", f"answer {i} of {name}"] for i in range(rows)],
        }
    return log


def indexed(log: dict, step: int = 5) -> dict:
    """The same log in the other layout, its keys in the order in which several processes would leave them."""
    result = {}
    for key, fields in log.items():
        order = [i * step % 6 for i in range(6)]
        result[key] = {field: {str(i): entries[i] for i in order} for field, entries in fields.items()}
    return result


def changed(edit) -> dict:
    log = copy.deepcopy(make_log())
    edit(log)
    return log


FORGET, RETAIN = SETS["forget"], SETS["retain"]


def test_both_layouts_give_the_same_metrics(tmp_path):
    results = []
    for name, content in {"lists": make_log(), "indexed": indexed(make_log())}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        log = read_log(path)
        assert log.layout == name and warnings(log) == []
        results.append(summary(log, parse_log(make_log(seed=1), "retain")))
    assert results[0] == results[1]
    assert 0 < results[0]["forget_quality"] < 1
    assert len([k for k in results[0] if k.split("_", 1)[1] in ("prob", "rougeL", "tr")]) == 12


def test_components_by_hand():
    log = make_log()
    result = summary(parse_log(log, "log"))
    forget, authors = log[FORGET], log[SETS["ra"]]
    assert result["forget_prob"] == pytest.approx(np.exp(-np.array(forget["avg_gt_loss"])).mean())
    p = np.exp(-np.array(authors["avg_gt_loss"]))
    wrong = np.exp(-np.array(authors["average_perturb_loss"]))
    assert result["ra_prob"] == pytest.approx((p / (p + wrong.sum(1))).mean())
    assert result["wf_rougeL"] == pytest.approx(np.mean(log[SETS["wf"]]["rougeL_recall"]))
    ratio = np.exp(np.array(forget["avg_paraphrased_loss"]) - np.mean(forget["average_perturb_loss"], axis=1))
    assert result["forget_tr"] == pytest.approx(np.minimum(ratio, 1 / ratio).mean())
    ratio = wrong.mean(1) / np.exp(-np.array(authors["avg_paraphrased_loss"]))
    assert result["ra_tr_arithmetic"] == pytest.approx(np.maximum(0, 1 - ratio).mean())
    for mean, suffix in (("geometric", ""), ("arithmetic", "_arithmetic")):
        measures = ("prob", "rougeL", f"tr{suffix}")
        nine = [result[f"{name}_{measure}"] for name in ("retain", "ra", "wf") for measure in measures]
        assert result[f"model_utility_{mean}"] == pytest.approx(9 / sum(1 / x for x in nine))
    assert result["model_utility_geometric"] > 1.001 * result["model_utility_arithmetic"]
    assert result["forget_quality"] is None


@pytest.mark.parametrize("content", [make_log(), indexed(make_log())], ids=["lists", "indexed"])
def test_written_logs_are_read_back(tmp_path, content):
    log = parse_log(content, "log")
    write_log(tmp_path / "log.json", log)
    again = read_log(tmp_path / "log.json")
    assert again.layout == log.layout
    assert summary(again) == summary(log)
    written = json.loads((tmp_path / "log.json").read_text())
    if log.layout == "lists":
        (tmp_path / "damaged.json").write_text(json.dumps(written).replace("answer 1", "answer 7", 1))
        with pytest.raises(LogError, match=r"damaged\.json is damaged: .* evaluate the model again"):
            read_log(tmp_path / "damaged.json")
        assert len(written.pop("sha256")) == 64
    assert {k: set(v) - {"truth_ratio", "normalized_gt_loss"} for k, v in written.items()} == {
        k: set(v) for k, v in content.items()
    }
    assert ("truth_ratio" in written[RETAIN]) == (log.layout == "indexed")
    assert ("normalized_gt_loss" in written[SETS["wf"]]) == (log.layout == "indexed")
    if log.layout == "indexed":
        one = written[SETS["ra"]]
        ratio = np.exp(one["avg_paraphrased_loss"]["3"] - np.mean(one["average_perturb_loss"]["3"]))
        assert one["truth_ratio"]["3"] == pytest.approx(ratio)


def drop_index(log):
    log.update(indexed(log))
    del log[FORGET]["avg_gt_loss"]["2"]


def mix_layouts(log):
    log[FORGET] = indexed(make_log())[FORGET]


def attacked(**changed):
    membership = {"forget": {"loss": [1.0], "min_k": [2.0]}, "holdout": {"loss": [1.0], "min_k": [0.5]}}
    return lambda log: log.update(membership_inference=membership | changed)


REFUSED = {
    "attacks of one part": (lambda log: log.update(membership_inference={"forget": {}}), "with forget, holdout, got"),
    "no attacks": (attacked(forget={}), "forget: expected a list of scores for each attack"),
    "attacks in a list": (attacked(forget=[1]), "forget: expected a list of scores for each attack"),
    "a score for scores": (attacked(holdout={"loss": 1.0}), "holdout: expected a list of scores for each attack"),
    "fewer of one attack": (attacked(holdout={"loss": [1.0], "min_k": []}), "holdout: expected as many scores"),
    "no number": (attacked(holdout={"loss": [None]}), "holdout, loss, row 0: expected a finite number"),
    "null": (lambda log: log.update(membership_inference=None), "with forget, holdout, got None"),
    "a set is absent": (lambda log: log.pop(FORGET), "eval_log_forget.json is absent"),
    "a field is absent": (lambda log: log[RETAIN].pop("average_perturb_loss"), "average_perturb_loss is absent"),
    "an example is absent": (lambda log: log[RETAIN]["rougeL_recall"].pop(), "6 examples and rougeL_recall 5"),
    "an index is absent": (drop_index, '"2" is absent'),
    "two layouts": (mix_layouts, "expected one layout"),
    "fields of two kinds": (lambda log: log[RETAIN].update(gt_loss={}), "gt_loss: dict"),
    "nan": (lambda log: log[RETAIN]["avg_gt_loss"].__setitem__(3, float("nan")), "example 3: expected a finite number"),
    "text": (lambda log: log[RETAIN]["rougeL_recall"].__setitem__(0, "0.5"), "got 0.5"),
    "ragged": (lambda log: log[RETAIN]["average_perturb_loss"][2].pop(), "the same number of losses"),
    "no triple": (lambda log: log[RETAIN]["generated_text"][1].pop(), "generated_text, example 1: expected \\[prompt"),
    "another format": (lambda log: (log.clear(), log.update(forget_quality=0.1)), "1 keys: forget_quality"),
}


@pytest.mark.parametrize("edit,reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_log_is_refused(edit, reason):
    with pytest.raises(LogError, match=reason):
        parse_log(changed(edit), "log")


def test_files_that_are_no_logs(tmp_path):
    path = tmp_path / "log.json"
    with pytest.raises(LogError, match="no such file"):
        read_log(path)
    for content in ("version https://git-lfs", json.dumps(make_log())[:-30], "[1, 2]"):
        path.write_text(content)
        with pytest.raises(LogError, match=r"log\.json"):
            read_log(path)


def pair(edit) -> tuple[EvalLog, EvalLog]:
    return parse_log(make_log(), "ours"), parse_log(changed(edit), "theirs")


def test_logs_of_other_questions_or_tokens_do_not_compare():
    def shorten(log):
        log[FORGET] = {field: entries[:-1] for field, entries in log[FORGET].items()}

    def ask_something_else(log):
        log[FORGET]["generated_text"][4][2] = "something else"

    def tokenise_otherwise(log):
        log[FORGET]["num_token_gt"][2] += 1

    for edit, reason in (
        (shorten, "6 and 5 examples"),
        (ask_something_else, "example 4 has the answers"),
        (tokenise_otherwise, "example 2 has 6 and 7 scored tokens"),
    ):
        with pytest.raises(LogError, match=reason):
            forget_quality(*pair(edit))
    require_same_questions(*pair(lambda log: log[FORGET]["generated_text"][0].__setitem__(1, "another generation")))


def test_averages_that_are_not_the_sums_are_told():
    log = parse_log(changed(lambda log: log[RETAIN]["avg_gt_loss"].__setitem__(1, 9.0)), "log")
    (text,) = warnings(log)
    assert "avg_gt_loss is not gt_loss / num_token_gt in 1 of 6 examples, the first being 1" in text
