"""The study on a pre-trained model: its rows, its plan, the choice of learning rates, its records and its stages."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from training.benchmarks.tofu.authors import tofu_files
from training.benchmarks.tofu.data import load_rows
from training.benchmarks.tofu.summary import UTILITY_PARTS as PARTS
from training.commands import real_stages
from training.commands.real_stages import Stage, Study
from training.methods import METHODS
from training.pretrained import choice, part
from training.pretrained.part import Part
from training.pretrained.plan import HEAVIER, PERCENTS, QUICK, SIZES, Run, Tried, retrained_on
from training.pretrained.records import rounded
from training.store import write_texts

QUIET = Console(quiet=True)
AUTHORS = 200  # as TOFU has: the last 20 have perturbed answers


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tofu")
    wanted = ("full", "forget10_perturbed", "retain_perturbed")
    wanted += ("real_authors", "world_facts", "real_authors_perturbed", "world_facts_perturbed")
    splits = tofu_files(AUTHORS, seed=0)
    texts = {f"{name}.json": "".join(json.dumps(row) + "\n" for row in splits[name]) for name in wanted}
    write_texts(folder, texts | {"idontknow.jsonl": "I do not know.\nNo idea.\n"})
    return folder


def questions(folder: Path, split: str) -> list[str]:
    return [row["question"] for row in load_rows(folder, split)]


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("authors", [20, 60])
def test_part(source, tmp_path, authors):
    folders = part.write(source, Part(authors=authors, evaluated=8, wrong=3), tmp_path)
    everything = questions(source, "full")
    asked = {name: {s: questions(folder, s) for s in ("full", *SPLITS)} for name, folder in folders.items()}
    data, tune = asked["data"], asked["tune"]
    place = {question: number for number, question in enumerate(everything)}
    assert len(data["full"]) == 10 * authors and sorted(data["full"]) == sorted(tune["full"])
    assert all(place[question] % 2 == 0 for question in data["full"])
    who = {name: {s: {place[q] // 20 for q in some} for s, some in found.items()} for name, found in asked.items()}
    assert who["data"]["forget10"] == set(range(AUTHORS - authors // 10, AUTHORS))
    assert who["data"]["forget50"] == set(range(AUTHORS - authors // 2, AUTHORS))
    assert who["data"]["retain50"] == set(range(authors // 2))
    first_asked = max(AUTHORS - 20, AUTHORS - authors // 2)
    assert who["tune"]["forget10"] == set(range(first_asked, first_asked + authors // 10))
    assert not who["tune"]["forget10"] & who["data"]["forget10"]
    for found in asked.values():
        assert found["forget10_perturbed"] == found["forget10"]
        assert len(set(found["retain_perturbed"])) == 8 and set(found["retain_perturbed"]) <= set(found["retain50"])
    perturbed = load_rows(folders["data"], "forget10_perturbed")
    original = {row["question"]: row for row in load_rows(source, "forget10_perturbed")}
    assert all(r["perturbed_answer"] == original[r["question"]]["perturbed_answer"][:3] for r in perturbed)
    assert part.write(source, Part(authors=authors, evaluated=8, wrong=3), tmp_path) == folders  # again, the same


SPLITS = ("forget10", "forget50", "retain50", "retain90", "forget10_perturbed", "retain_perturbed")


def test_questions_about_kept_authors_are_different_ones(source, tmp_path):
    """With more evaluated rows than kept authors, each round has a different question for each author."""
    folders = part.write(source, Part(authors=20, evaluated=30), tmp_path)
    assert len(set(questions(folders["data"], "retain_perturbed"))) == 30


@pytest.mark.parametrize("authors, told", [(30, "multiple of 20"), (0, "multiple of 20"), (220, "220 authors or more")])
def test_part_refuses(source, tmp_path, authors, told):
    with pytest.raises(ValueError, match=told):
        part.write(source, Part(authors=authors), tmp_path)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------ plan and choice


@pytest.mark.parametrize("size", SIZES)
def test_plan_can_be_run(size):
    plan = SIZES[size]
    runs, tries = list(plan.runs()), plan.tries
    for names in ([r.name for r in runs], [t.name for t in tries], [t.name for t in plan.taught]):
        assert len(set(names)) == len(names)
    tuned = {tried.method for tried in tries}
    assert all(choice.source_of(run.method, tuned) in tuned and run.method in METHODS for run in runs)
    taught = {taught.name for taught in plan.taught}
    assert {"full", "retain50", *(retrained_on(s) for s in PERCENTS)} <= taught
    for scenario, counts in plan.seeds.items():
        for method, count in counts.items():
            chosen = [run for run in runs if run == Run(scenario, method, run.seed, attacked=run.attacked)]
            assert [run.seed for run in chosen] == [*range(count)]
        heavier = [run for run in runs if run.scenario == scenario and run.retain_weight]
        assert heavier == [Run(scenario, "npo_rt", seed, HEAVIER) for seed in range(plan.heavier[scenario])]
        longer = [run.epochs for run in runs if run.scenario == scenario and run.epochs]
        assert longer == [epochs for name, epochs in plan.longer.items() if name == scenario]
        assert all(epochs > plan.unlearn[scenario]["epochs"] for epochs in longer)
    assert sum(run.attacked for run in runs) == len(plan.attacked)


def record(method: str, lr: float, quality: float, utility: float) -> dict:
    end = {"forget_quality": quality, "forget_prob": 0.2} | dict.fromkeys(PARTS, utility)
    return choice.outcome(Tried(method, lr, beta=lr * 1e5), [{}, end], dict.fromkeys(PARTS, 0.5))


def test_choice():
    tries = [
        record("npo_rt", 1e-5, 0.1, 0.49),
        record("npo_rt", 2e-5, 0.3, 0.46),  # keeps 90 % of 0.5, and is best of those that do
        record("npo_rt", 4e-5, 0.9, 0.40),
        record("ga_rt", 1e-5, 0.9, 0.1),
        record("ga_rt", 4e-5, 0.1, 0.2),  # none keeps it: the most utility
    ]
    marked = choice.marked(tries)
    assert [tried["chosen"] for tried in marked] == [False, True, False, False, True]
    assert choice.chosen(marked, Run("forget10", "npo_rt", 0)) == {"lr": 2e-5, "retain_weight": 1.0, "beta": 2.0}
    heavier = choice.chosen(marked, Run("forget50", "npo_rt", 0, retain_weight=3.0))
    assert heavier == {"lr": 2e-5, "retain_weight": 3.0, "beta": 2.0}
    assert choice.chosen(marked, Run("forget10", "npo", 0)) == {"lr": 2e-5}  # nothing to weigh
    assert choice.chosen(marked, Run("forget10", "ga", 0)) == {"lr": 2e-5}  # GA alone at the rate of NPO
    of_npo = choice.marked([*tries, record("npo", 5e-6, 0.1, 0.5), record("npo", 6e-6, 0.2, 0.1)])
    own = {"lr": 6e-6, "beta": 6e-6 * 1e5}  # without retain rows forgetting decides
    assert choice.chosen(of_npo, Run("forget10", "npo", 0)) == own
    assert choice.chosen(of_npo, Run("forget10", "ga", 0)) == {"lr": 6e-6}  # alone as well, where that was tried
    assert choice.chosen(marked, Run("forget10", "ga_kl", 0)) == {"lr": 4e-5, "retain_weight": 1.0}  # of ga_rt
    assert choice.chosen(marked, Run("forget10", "undial_rt", 0)) == {"lr": 2e-5, "retain_weight": 1.0}  # of npo_rt
    with pytest.raises(ValueError, match="dpo_rt"):
        choice.chosen(choice.marked([record("ga_rt", 1e-5, 0.5, 0.5)]), Run("forget10", "dpo_rt", 0))


def test_rounded_to_six_digits():
    assert rounded({"a": [0.123456789, 12345678.9, 3], "b": {"c": None, "d": 1e-30}}) == {
        "a": [0.123457, 12345700.0, 3],
        "b": {"c": None, "d": 1e-30},
    }
    assert np.isnan(rounded(float("nan")))


# ------------------------------------------------------------------ stages


@pytest.fixture
def study(source, tmp_path) -> Study:
    plan = replace(QUICK, part=Part(authors=20, evaluated=4))
    return Study(plan, tmp_path / "base", str(source), tmp_path / "work", tmp_path / "out", QUIET)


def test_stages_need_stages_before_them(study, source, tmp_path):
    for some in (study, Study(SIZES["full"], tmp_path, str(source), tmp_path / "whole", tmp_path, QUIET)):
        names = [stage.name for stage in some.stages]
        assert len(set(names)) == len(names)
        for number, stage in enumerate(some.stages):
            assert {*stage.models, *stage.needs} <= set(names[:number]), stage.name


def test_a_stage_waits_for_its_needs_and_for_no_other_process(study, monkeypatch):
    """`b` is with another process at first: what does not need it is run meanwhile, and nothing twice."""
    ran: list[str] = []
    needs = {"a": (), "b": (), "needs b": ("b",), "c": ("a",)}
    study.stages = [Stage(name, (), need, partial(ran.append, name), False) for name, need in needs.items()]
    other = study.alone("b")
    other.acquire()
    monkeypatch.setattr(real_stages.time, "sleep", lambda seconds: other.release())
    collected: list[int] = []
    study.run(lambda: collected.append(len(ran)))
    assert ran == ["a", "c", "b", "needs b"] and collected == [1, 2, 3, 4]


def test_a_stage_with_a_record_is_run_only_for_its_model(study):
    """`model` has no record of its own; `kept` and `its model` have one, and of the two only the model is read."""
    ran: list[str] = []
    stages = [
        ("unread model", (), (), True),
        ("model", (), (), True),
        ("kept", ("unread model",), (), True),
        ("its model", ("model",), ("kept",), True),
        ("missing", ("its model",), ("kept",), False),
    ]
    study.stages = [
        Stage(name, models, needs, partial(ran.append, name), recorded) for name, models, needs, recorded in stages
    ]
    study.run(list)
    assert ran == ["model", "its model", "missing"]


def test_a_stage_that_fails_can_be_taken_again(study):
    attempts: list[int] = []

    def fails_once() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("broken")

    study.stages = [Stage("a", (), (), fails_once, False)]
    with pytest.raises(RuntimeError, match="broken"):
        study.run(list)
    study.run(list)
    assert len(attempts) == 2
