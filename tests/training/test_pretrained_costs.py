"""Plain and fused compute the same, as near to float64 as float32 gets; what was measured is not measured again."""

import copy
import json
import os

import pytest
from rich.console import Console

from tests.training.conftest import llama
from training.methods import METHODS, method_named
from training.pretrained import costs, plain
from training.pretrained.both_ways import Task, Workbench, apart, checked, move, of_step
from training.pretrained.costs import Case, in_own_process, measure, table
from training.pretrained.plain import PlainModel, PlainSteps


@pytest.fixture(scope="module")
def rows(corpus):
    forget, retain = corpus.rows[-6:], corpus.rows[:6]
    return {"forget": forget, "retain": retain, "idk": [row | {"answer": "I do not know that."} for row in forget]}


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    llama(corpus).save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)
    return folder


def task(folder, rows, method, count=3):
    mine = costs.first_rows(method_named(method), rows, count)
    return Task(str(folder), method, mine, "plain", "cpu", "auto", 1, warmup=1, timed=1)


@pytest.mark.parametrize("method", [*costs.METHODS, "undial", "tnpo_rt", "pdu", "simnpo_kl", "altpo_rt"])
def test_both_ways_are_as_near_to_float64(folder, rows, method):
    bench = Workbench(task(folder, rows | {"alternate": rows["retain"]}, method))
    fused, on_logits = bench.fused(), bench.plain()
    move(bench.model)
    found, expected = of_step(*fused), of_step(*on_logits)
    steps = on_logits[1]
    frozen = None if steps.frozen is None else copy.deepcopy(steps.frozen).double()
    settings = bench.method.settings()
    steps = PlainSteps(bench.method, settings, bench.plan, bench.rows, bench.batches, frozen)
    exact = of_step(PlainModel(copy.deepcopy(bench.model).double()), steps)
    for loss, _ in (found, expected):
        assert loss == pytest.approx(exact[0], rel=1e-5)
    assert apart(found[1], exact[1]) < max(3 * apart(expected[1], exact[1]), 1e-6)
    assert apart(expected[1], exact[1]) < 1e-4


def test_ways_that_differ_by_a_percent_are_refused(folder, rows, monkeypatch):
    assert checked(task(folder, rows, "undial"))["gradient"] < 1e-4
    monkeypatch.setitem(plain.ON_LOGITS, "undial", lambda *given: 1.01 * plain.undial(*given))
    with pytest.raises(ValueError, match=r"undial: the fused loss is .* they do not compute the same"):
        checked(task(folder, rows, "undial"))


@pytest.mark.parametrize("method", ["rmu_rt", "adaptive_rmu", "dipo_rt", "kto"])
def test_methods_without_a_plain_form(method):
    with pytest.raises(ValueError, match=f"{METHODS[method].label}: expected a method on log-prob".replace("+", r"\+")):
        PlainSteps(METHODS[method], METHODS[method].settings(), None, {}, None)


@pytest.fixture
def here(monkeypatch):
    """Measurements in this process; what was run."""
    ran = []

    def run(words, function, *given):
        ran.append(words)
        return function(*given)

    monkeypatch.setattr(costs, "in_own_process", run)
    return ran


def test_what_was_measured_is_not_measured_again(folder, rows, here, tmp_path):
    out = tmp_path / "costs.json"

    def run(methods, rows=rows, **given):
        cases = [Case("tiny", methods, 2), Case("absent", methods, 2)]
        return measure({"tiny": folder}, rows, out, Console(quiet=True), cases=cases, device="cpu", timed=1, **given)

    first = run(["ga_kl"])
    assert here == ["tiny ga_kl", "tiny ga_kl fused", "tiny ga_kl plain"]
    assert json.loads(out.read_text()) == first
    both = run(["ga_kl", "idk_rt"])
    assert here[3:] == ["tiny idk_rt", "tiny idk_rt fused", "tiny idk_rt plain"]
    assert both["measured"][:2] == first["measured"]
    run(["ga_kl"], rows | {"retain": rows["retain"][1:]})
    assert here[6:] == here[:3]  # of other rows, in the place of the old ones
    entries = json.loads(out.read_text())["measured"]
    assert [(e["method"], e["way"]) for e in entries] == [(m, w) for m in ("idk_rt", "ga_kl") for w in costs.WAYS]
    assert [e["method"] for e in run(["ga_kl"], device_name="another")["measured"]] == ["ga_kl"] * 2


def test_an_entry_has_the_tokens_of_the_rows_that_are_used(folder, rows, here, corpus, tmp_path):
    cases = [Case("tiny", ["idk_rt", "ga"], 2)]
    found = measure({"tiny": folder}, rows, tmp_path / "c", Console(quiet=True), cases=cases, device="cpu", timed=2)
    for entry in found["measured"]:
        used = ("idk", "retain") if entry["method"] == "idk_rt" else ("forget",)
        examples = [example for kind in used for example in corpus.format.encode(rows[kind][:2])]
        assert entry["batch"] == {
            "forget_rows": 2,
            "retain_rows": 2 if "retain" in used else 0,
            "tokens": sum(len(e.input_ids) for e in examples),
            "scored_tokens": sum(label != -100 for e in examples for label in e.labels),
        }
        assert len(entry["step_seconds"]) == 2 and 0 < entry["before_gib"] <= entry["peak_gib"]
        seconds = sum(entry["step_seconds"]) / 2
        assert entry["tokens_per_second"] == pytest.approx(entry["batch"]["tokens"] / seconds)


def test_too_few_rows(folder, rows, here, tmp_path):
    with pytest.raises(ValueError, match="costs of ga_rt: expected 7 forget rows, got 6"):
        measure({"t": folder}, rows, tmp_path / "c", Console(quiet=True), cases=[Case("t", ["ga_rt"], 7)], device="cpu")


def test_the_table_says_how_much_faster_and_smaller():
    def entry(method, way, speed, peak):
        of_step = {"step_seconds": [9.0, 5 / speed, 0.0], "tokens_per_second": speed, "peak_gib": peak}
        return {"model": "m", "method": method, "way": way, **of_step, "vocab_size": 9, "batch": {"tokens": 5}}

    measured = [
        entry("npo_rt", "fused", 40.0, 1.0),
        entry("npo_rt", "plain", 20.0, 4.0),
        entry("ga", "plain", 2.0, 1.0),
    ]
    headings, lines = table({"measured": measured})
    assert lines == [
        ["m", "NPO+RT", 9, 5, 0.125, 0.25, 40.0, 20.0, 2.0, 1.0, 4.0, 0.25],
        ["m", "GA", 9, 5, None, 2.5, None, 2.0, None, None, 1.0, None],
    ]
    assert len(headings) == len(lines[0])
    assert table({})[1] == []


def test_a_measurement_has_a_process_of_its_own():
    assert in_own_process("x", eval, "{'pid': __import__('os').getpid()}")["pid"] != os.getpid()
    with pytest.raises(ValueError, match="costs of x: expected a process that finishes, and it was ended"):
        in_own_process("x", eval, "__import__('os')._exit(9)")
