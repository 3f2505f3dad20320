"""The Markov experiment at a small size: chains, losses and distances against plain code, and the command."""

import json
import runpy
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from training.commands import markov
from training.commands.markov import MarkovOptions, main
from training.papers.paths import at_place, first_place
from training.papers.simnpo_markov import figures, report, setting
from training.papers.simnpo_markov.experiment import (
    METHODS,
    SWEEP,
    Run,
    case_runs,
    draw_batches,
    loss_of,
    measure,
    measured_at,
    unlearn,
)
from training.papers.simnpo_markov.experiment import (
    Path as RunPath,
)
from training.papers.simnpo_markov.report import claims, sweep_claims, verdict
from training.papers.simnpo_markov.setting import CHAINS, Case, Setting, batches, make_settings
from training.reports.claims import Difference

ROOT = Path(__file__).parents[2]
SHORT = Case(3)
FEW = 20  # batches of training


@pytest.fixture(scope="module")
def small():
    """A model of one layer that has learned little, and fewer sequences: what is tested does not depend on either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting, "LAYERS", 1)
        patch.setattr(setting, "WIDTH", 32)
        patch.setattr(setting, "NUM_SEQUENCES", {"retain": 200, "forget1": 100, "forget2": 100})
        patch.setattr(setting, "NUM_TEST_TOKENS", 30)
        yield


@pytest.fixture(scope="module")
def experiment(small) -> Setting:
    return make_settings(3, [SHORT], FEW)[SHORT]


@pytest.fixture
def moved(experiment):
    """A model on its way: away from the reference, where all log-ratios are 0."""
    rng = torch.Generator().manual_seed(5)
    model = deepcopy(experiment.reference).requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model


def logps_of(model, sequence: list[int]) -> torch.Tensor:
    """(T - 1, 10) float64 log-probabilities of the next state, by a float64 copy, one sequence without padding."""
    return torch.log_softmax(model(input_ids=torch.tensor([sequence])).logits[0, :-1], -1)


def summed(model, sequence: list[int]) -> torch.Tensor:
    return sum((row[state] for row, state in zip(logps_of(model, sequence), sequence[1:], strict=True)))


def unpadded(rows: torch.Tensor) -> list[list[int]]:
    return [[state for state in row if state != -100] for row in rows.tolist()]


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_the_stated_matrix(name):
    own = {"retain": [0, 1, 2], "forget1": [3, 4, 5], "forget2": [6, 7, 8]}[name]
    start, matrix = CHAINS[name]
    for i in range(10):
        for j in range(10):
            expected = 0.1 if i not in own else 0.8 / 3 if j in own else 0.2 / 7
            assert matrix[i, j].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(start, matrix[own[0]])
    torch.testing.assert_close(matrix.sum(1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("name", CHAINS)
def test_sequences_move_as_the_matrix_says(name):
    """Frequencies of 95000 transitions: each within 5 standard deviations; own states, leakage and state 9."""
    chain = CHAINS[name]
    sequences = chain.sample(5000, 20, torch.Generator().manual_seed(1))
    moves = 10 * sequences[:, :-1] + sequences[:, 1:]
    counts = torch.bincount(moves.flatten(), minlength=100).reshape(10, 10).double()
    total = counts.sum(1, keepdim=True)
    assert (total > 1000).all()
    deviation = (chain.matrix * (1 - chain.matrix) / total).sqrt()
    assert ((counts / total - chain.matrix).abs() < 5 * deviation).all()
    first = torch.bincount(sequences[:, 0], minlength=10) / 5000
    assert ((first - chain.start).abs() < 5 * (chain.start * (1 - chain.start) / 5000).sqrt()).all()
    own = chain.start > 0.2
    leaked = counts[own][:, ~own].sum() / counts[own].sum()
    assert leaked.item() == pytest.approx(0.2, abs=0.01)
    assert counts[own, 9].sum() / counts[own].sum() == pytest.approx(0.2 / 7, abs=0.005)
    assert counts[9].sum() > 1000 and ((counts[9] / counts[9].sum() - 0.1).abs() < 0.05).all()  # nobody's: uniform


def test_rows_are_sequences_with_what_is_behind_left_out(experiment):
    assert {chain: tuple(rows.shape) for chain, rows in experiment.train.items()} == {
        "retain": (160, 20), "forget1": (80, 20), "forget2": (80, 20),
    }  # fmt: skip
    assert (experiment.train["forget2"][:, 3:] == -100).all() and (experiment.train["forget2"][:, :3] >= 0).all()
    assert (experiment.train["forget1"] >= 0).all()
    assert {chain: rows.shape[0] * (rows.shape[1] - 1) for chain, rows in experiment.test.items()} == {
        "retain": 38, "forget1": 38, "forget2": 30,
    }  # fmt: skip


def test_cases_share_what_is_the_same(small):
    cases = [Case(3), Case(20), Case(20, seen=False)]
    found = make_settings(7, cases, FEW)
    three, twenty, unseen = (found[case] for case in cases)
    assert three.retrained is twenty.retrained is unseen.retrained
    assert torch.equal(three.train["forget1"], unseen.train["forget1"])
    assert torch.equal(twenty.train["forget2"], unseen.train["forget2"])
    weights = [torch.cat([p.flatten() for p in of.reference.parameters()]) for of in (three, twenty, unseen)]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (1, 2)))
    again = make_settings(7, cases[1:2], FEW)[Case(20)]  # whatever other cases there are
    assert all(map(torch.equal, again.reference.parameters(), twenty.reference.parameters()))
    other = make_settings(8, cases[1:2], FEW)[Case(20)]
    assert not torch.equal(other.train["retain"], twenty.train["retain"])


def test_the_unseen_chain_is_not_trained_on(small, monkeypatch):
    learned = []
    monkeypatch.setattr(setting, "train", lambda rows, seed, steps: learned.append(rows))
    make_settings(7, [Case(20), Case(20, seen=False)])
    assert [len(rows) for rows in learned] == [160, 320, 240]  # retrained, all, without forget2
    assert torch.equal(learned[1][:240], learned[2]) and torch.equal(learned[0], learned[2][:160])


def test_training_goes_down_the_loss(experiment):
    """Towards what the states say: the reference is nearer to forget1 than the retrained model."""
    retrained, reference = measure(experiment, experiment.retrained), measure(experiment, experiment.reference)
    assert reference["forget1_quality"] < retrained["forget1_quality"]
    assert retrained["retain_quality"] < reference["retain_quality"] < np.log(10)
    assert retrained["forget1_distance"] == retrained["retain_distance"] == 0


def test_batches_come_once_before_they_come_again():
    rows = torch.arange(10).unsqueeze(1)
    drawn = batches(rows, 5, 4, torch.Generator().manual_seed(0))
    states = torch.cat(drawn).flatten().tolist()
    assert len(drawn) == 5 and sorted(states[:10]) == sorted(states[10:]) == list(range(10)) != states[:10]


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_plain_code(name, experiment, moved):
    """Values and gradients, against float64 sequences one by one, of lengths 20 and 3."""
    method, beta = METHODS[name], 0.7
    step = next(
        batch for batch in draw_batches(experiment, 20, seed=1) if len({*map(len, unpadded(batch.forget))}) == 2
    )
    loss = loss_of(method, moved, experiment.reference, step, beta)
    model, reference = deepcopy(moved).double(), deepcopy(experiment.reference).double()
    terms = []
    for sequence in unpadded(step.forget):
        logp, ref = summed(model, sequence), summed(reference, sequence).detach()
        ratio = logp - ref if method.family == "NPO" else logp / (len(sequence) - 1)
        terms.append(2 / beta * torch.log1p(torch.exp(beta * ratio)))
    expected = sum(terms) / 4
    if method.retain == "RT":
        sequences = unpadded(step.retain)
        expected = expected - sum(summed(model, s) for s in sequences) / sum(len(s) - 1 for s in sequences)
    if method.retain == "KL":
        for sequence in unpadded(step.retain):
            ours, theirs = logps_of(model, sequence), logps_of(reference, sequence).detach()
            expected = expected + (theirs.exp() * (theirs - ours)).sum() / 4
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    parameters = [list(of.parameters()) for of in (moved, model)]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters[0]), torch.autograd.grad(expected, parameters[1]), strict=True
    ):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm() + 1e-6


def test_before_the_first_step_npo_is_its_constant(experiment):
    """The cached log-probabilities are of the same rows."""
    for batch in draw_batches(experiment, 3, seed=2):
        loss = loss_of(METHODS["NPO"], experiment.reference, experiment.reference, batch, 1.0)
        assert loss.item() == pytest.approx(2 * np.log(2), abs=1e-5)


def test_distances_are_those_of_plain_code(experiment, moved):
    found, model, aim = measure(experiment, moved), deepcopy(moved).double(), deepcopy(experiment.retrained).double()
    for chain, rows in experiment.test.items():
        distances, qualities = [], []
        for sequence in rows.tolist():
            for ours, theirs, state in zip(logps_of(model, sequence), logps_of(aim, sequence), sequence, strict=False):
                truth = CHAINS[chain].matrix[state]
                distances.append((theirs.exp() * (theirs - ours)).sum().item())
                qualities.append((truth * (truth.log() - ours)).sum().item())
        assert found[f"{chain}_distance"] == pytest.approx(np.mean(distances), rel=1e-4, abs=1e-6)
        assert found[f"{chain}_quality"] == pytest.approx(np.mean(qualities), rel=1e-4, abs=1e-6)


def test_unlearning_forgets_and_repeats(experiment):
    drawn = draw_batches(experiment, 6, seed=1)
    path, again = (unlearn(experiment, Run(METHODS["SimNPO"]), drawn) for _ in range(2))
    assert path.steps.tolist() == list(range(7))
    assert path.forget("quality")[-1] > path.forget("quality")[0]
    assert all(np.array_equal(path.values[name], again.values[name]) for name in path.values)
    other = unlearn(experiment, Run(METHODS["SimNPO"]), draw_batches(experiment, 6, seed=2))
    assert not np.array_equal(path.values["forget1_quality"], other.values["forget1_quality"])
    assert all(not parameter.requires_grad for parameter in experiment.reference.parameters())


def test_measurements_are_dense_at_first():
    assert measured_at(22) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 22] and measured_at(2) == [0, 1, 2]


def test_places_are_between_measurements():
    values = np.array([0.0, 0.2, 0.1, 0.6])
    assert first_place(values, 0.1) == 0.5 and first_place(values, 0.35) == pytest.approx(2.5)
    assert first_place(values, 0.0) == 0 and first_place(values, 9.0) == 3
    assert at_place(values, 2.5) == pytest.approx(0.35) and at_place(values, 3) == 0.6


def test_outcomes_are_read_off_the_path():
    values = {
        "retain_quality": np.array([0.02, 0.06, 0.16, 0.3]),
        "forget1_quality": np.array([0.0, 0.2, 0.6, 2.0]),
        "forget2_quality": np.array([0.2, 0.4, 0.6, 1.0]),
        "forget1_distance": np.array([0.3, 0.1, 0.3, 1.0]),
        "forget2_distance": np.array([0.3, 0.2, 0.0, 1.0]),
    }
    found = RunPath(np.array([0, 1, 2, 3]), values).outcome(aim=0.45)
    assert found["spent_step"] == pytest.approx(1.4)
    assert (found["spent_forget1"], found["spent_forget2"]) == (pytest.approx(0.36), pytest.approx(0.48))
    assert found["aim_step"] == pytest.approx(1.5) and found["aim_retain"] == pytest.approx(0.11)
    assert found["best_step"] in (1, 2) and found["best_distance"] == pytest.approx(0.15)
    assert found["end_forget1"] == 2.0 and found["end_step"] == 3


def test_retain_terms_are_for_the_published_lengths():
    assert list(case_runs(Case(5))) == list(METHODS) and list(case_runs(Case(10))) == ["NPO", "SimNPO"]
    assert all(run.lr == 5e-4 and run.beta == 1 for run in case_runs(Case(5)).values())


def test_intervals_are_students():
    values = np.array([0.1, 0.2, 0.6])
    low, high = student.interval(0.95, 2, loc=values.mean(), scale=values.std(ddof=1) / 3**0.5)
    found = Difference.of(values)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert found.positive is None and Difference.of(np.array([1.0])).positive is None
    assert Difference.of(np.array([0.1, 0.11, 0.12])).positive and not Difference.of(-np.array([0.1, 0.11])).positive


def test_claims_and_verdicts_can_fail():
    keys = [f"{at}_{name}" for at in ("spent", "aim") for name in ("forget1", "forget2")] + ["best_distance"]
    same = {key: [0.5, 0.6, 0.7] for key in keys}
    metrics = {
        "per_seed": {case: {name: dict(same) for name in METHODS} for case in ("5", "20", "20, unseen")},
        "sweep": {name: dict(same) for name in SWEEP},
    }
    assert all(claim.holds is None for claim in claims(metrics) + sweep_claims(metrics))
    assert verdict(metrics).startswith("Cannot tell")
    metrics["per_seed"]["5"]["SimNPO"] |= {"spent_forget2": [0.8, 0.9, 1.01], "best_distance": [0.7, 0.8, 0.91]}
    assert verdict(metrics).startswith("Agrees")
    found = {claim.text: claim.holds for claim in claims(metrics)}
    assert [holds for holds in found.values() if holds is not None] == [True, True, False]
    assert found["SimNPO comes nearer to the retrained model than NPO (length 5)"] is False
    assert sweep_claims(metrics)[0].holds and sweep_claims(metrics)[1].holds is None  # of another setting it is as near
    metrics["sweep"]["NPO, beta 5"]["spent_forget2"] = [1.8, 1.9, 2.01]
    assert sweep_claims(metrics)[0].holds is False and "NPO, beta 5 1.903" in sweep_claims(metrics)[0].measured
    metrics["per_seed"]["5"]["SimNPO"]["spent_forget2"] = [0.2, 0.3, 0.41]
    assert verdict(metrics).startswith("Does not agree")
    metrics["per_seed"] = {"10": metrics["per_seed"]["20"]}
    assert claims(metrics) == [] and "no 5" in verdict(metrics)


def test_the_command(small, tmp_path, capsys, monkeypatch):
    options = MarkovOptions(lengths="5", seeds=2, steps=1, train_steps=FEW, out=tmp_path / "out", json=True)
    metrics = main(options)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and json.loads(lines[-1]) == metrics["methods"]
    assert list(metrics["methods"]) == ["5", "20, unseen"] and list(metrics["sweep"]) == list(SWEEP)
    assert list(metrics["methods"]["5"]) == list(METHODS)
    names = {"run.json", "options.yaml", "metrics.json", "config.json", "report.md", "figure.png", "lengths.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    monkeypatch.setattr(markov, "make_settings", lambda *_: pytest.fail("a finished run is not run again"))
    assert main(options) == metrics
    with pytest.raises(ValueError, match="holds a run with other settings"):
        main(replace(options, steps=2))
    monkeypatch.undo()
    text = (tmp_path / "out" / "report.md").read_text()
    assert verdict(metrics) in " ".join(text.split()) and str(tmp_path) not in text
    assert f"{metrics['methods']['5']['NPO']['best_distance']:.3f}" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["seeds"] == [1000, 2000] and "transformers" in config["versions"]
    for name in ("NPO", "SimNPO"):
        values = metrics["per_seed"]["5"][name]["best_distance"]
        assert metrics["methods"]["5"][name]["best_distance"] == pytest.approx(np.mean(values))


def test_one_seed_runs_again_to_the_bit(small, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "plot_paths", lambda *_: None)
    monkeypatch.setattr(figures, "plot_lengths", lambda *_: None)
    options = MarkovOptions(lengths="3", unseen=False, seeds=1, steps=2, train_steps=FEW, out=tmp_path / "a")
    first, second = main(options), main(replace(options, out=tmp_path / "b"))
    assert first == second and list(first["per_seed"]) == ["3"] and first["sweep"] == {}
    for name in ("metrics.json", "config.json", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert "--no_unseen" in (tmp_path / "a" / "report.md").read_text()


def test_the_command_line(small, tmp_path, monkeypatch, capsys):
    words = [
        "--lengths",
        "3",
        "--seeds",
        "1",
        "--steps",
        "1",
        "--train_steps",
        "20",
        "--no_unseen",
        "--no_sweep",
        "--json",
        "--out",
    ]
    monkeypatch.setattr(sys, "argv", ["markov", *words, str(tmp_path / "out")])
    runpy.run_module("training.markov", run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert list(found["3"]) == ["NPO", "SimNPO"] and (tmp_path / "out" / "config.json").exists()


def test_dry_run_runs_nothing(tmp_path, capsys):
    assert main(MarkovOptions(out=tmp_path / "out", dry_run=True)) is None
    assert json.loads(capsys.readouterr().out)["seeds"] == 3 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": "5,21"}, "--lengths: expected numbers from 2 to 20"),
        ({"lengths": "1"}, "--lengths"),
        ({"lengths": ""}, "--lengths"),
        ({"seeds": 0}, "--seeds: expected at least 1"),
        ({"steps": 0}, "--steps"),
        ({"train_steps": 5}, "--train_steps: expected at least 20"),
    ],
)
def test_what_the_command_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        main(MarkovOptions(**given))


def test_shipped_numbers_are_those_of_the_report():
    folder = ROOT / "training" / "results" / "simnpo_markov"
    metrics, config = (json.loads((folder / name).read_text()) for name in ("metrics.json", "config.json"))
    assert (folder / "report.md").read_text() == report.markdown(metrics, config)
