"""A grid at the smallest size: files, what is not run again, and a verdict that follows the numbers both ways."""

import json
from dataclasses import replace

import numpy as np
import pytest

from training import authors, evaluate, finetune, unlearn
from training.experiment import __main__ as experiment
from training.experiment.grid import ExperimentOptions, Grid
from training.experiment.report import best_quality_while_kept, claims


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    home = tmp_path_factory.mktemp("experiment")
    authors.main(authors.AuthorsOptions(out=home / "data", authors=20, seed=0))
    return ExperimentOptions(
        data_dir=str(home / "data"), out=home / "out", forget_percents="5", methods="ga,npo,npo_rt", seeds="0,1",
        epochs=2, finetune_epochs=2, hidden_size=64, eval_rows=6, max_new_tokens=3, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def metrics(options):
    return experiment.main(options)


def test_every_cell_was_run_and_evaluated(metrics, options):
    assert metrics == json.loads((options.out / "metrics.json").read_text())
    cells = {(run["percent"], run["method"], run["seed"]) for run in metrics["runs"]}
    assert cells == {(5, method, seed) for method in ("ga", "npo", "npo_rt") for seed in (0, 1)}
    for run in metrics["runs"]:
        assert [entry["epoch"] for entry in run["history"]] == [0, 1, 2]
        assert all(0 <= entry["forget_quality"] <= 1 for entry in run["history"])
        assert run["history"][0]["forget_quality"] == metrics["start"]["5"]["forget_quality"]
    by_seed = [run["history"][-1] for run in metrics["runs"] if run["method"] == "npo"]
    assert by_seed[0] != by_seed[1]  # seeds do something


def test_the_report_shows_what_was_measured_and_no_paths(metrics, options):
    out = options.out
    report = (out / "report.md").read_text()
    for name in ("trade_off_forget05.png", "epochs_forget05.png"):
        assert name in report and (out / name).read_bytes().startswith(b"\x89PNG")
    final = [run["history"][-1]["forget_prob"] for run in metrics["runs"] if run["method"] == "npo"]
    assert f"{np.median(final):.3g} [" in report
    for moment in ("before", "GA", "NPO", "NPO+RT"):
        assert f"- {moment}: " in report
    for name in ("report.md", "metrics.json", "config.json"):
        assert str(out.parent) not in (out / name).read_text()


def test_what_is_finished_is_not_run_again(metrics, options, monkeypatch):
    monkeypatch.setattr(unlearn, "run", None)
    monkeypatch.setattr(finetune, "run", None)
    monkeypatch.setattr(evaluate, "main", None)
    assert experiment.main(options) == metrics
    assert experiment.main(replace(options, methods="npo")) is not None
    experiment.main(options)  # the report is of the whole grid again
    with pytest.raises(TypeError):  # a new cell would be
        experiment.main(replace(options, seeds="0,1,2"))


def test_a_dry_run_lists_the_runs(options, capsys, tmp_path):
    assert experiment.main(replace(options, dry_run=True, out=tmp_path / "none", forget_percents="5,10")) is None
    said = capsys.readouterr().out
    assert said.count("unlearn forget05/") == said.count("unlearn forget10/") == 6
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "npo,rmu"}, "--methods: expected some of .* got rmu"),
        ({"seeds": "one"}, "--seeds: expected numbers"),
    ],
)
def test_bad_lists_say_so(changed, message, options):
    with pytest.raises(ValueError, match=message):
        Grid(replace(options, **changed))


def made_up(ga, npo, npo_rt):
    """metrics.json of three methods: (forget quality, utility, retain ROUGE-L) at two evaluations."""

    def history(points):
        keys = ("forget_quality", "model_utility_geometric", "retain_rougeL")
        return [dict(zip(keys, point, strict=True)) for point in [(1e-9, 0.6, 0.0), *points]]

    runs = {"ga": ga, "npo": npo, "npo_rt": npo_rt}
    return {
        "start": {"5": {"model_utility_geometric": 0.6}},
        "runs": [{"percent": 5, "method": m, "seed": 0, "history": history(points)} for m, points in runs.items()],
    }


def test_claims_follow_the_numbers():
    as_in_the_paper = made_up(
        ga=[(0.3, 0.2, 0.5), (1e-12, 0.0, 0.1)],
        npo=[(0.2, 0.4, 0.1), (0.1, 0.3, 0.2)],
        npo_rt=[(0.01, 0.59, 0.0), (0.4, 0.55, 0.1)],
    )
    assert [claim.holds for claim in claims(as_in_the_paper, 5)] == [True] * 5
    the_other_way = made_up(
        ga=[(0.3, 0.55, 0.5), (0.2, 0.5, 0.4)],
        npo=[(1e-9, 0.4, 0.1), (1e-8, 0.3, 0.2)],
        npo_rt=[(1e-9, 0.59, 0.0), (1e-3, 0.2, 0.1)],
    )
    assert [claim.holds for claim in claims(the_other_way, 5)] == [False] * 5
    nobody = made_up(*([(0.9, 0.0, 0.0), (0.9, 0.0, 0.0)] for _ in range(3)))  # keeps anything
    assert [claim.holds for claim in claims(nobody, 5)] == [True, False, False, False, False]
    of_more_authors = the_other_way | {"start": {"50": the_other_way["start"]["5"]}}
    of_more_authors["runs"] = [run | {"percent": 50} for run in the_other_way["runs"]]
    assert len(claims(of_more_authors, 50)) == 3  # the others are of larger retain weights


def test_the_best_quality_counts_only_what_was_kept():
    histories = {"npo": [[{"forget_quality": q, "model_utility_geometric": u} for q, u in
                          [(0.9, 0.6), (0.2, 0.5), (0.8, 0.1)]]]}  # fmt: skip
    assert best_quality_while_kept(histories, "npo", 0.48) == 0.2  # neither the start nor the collapse
    assert best_quality_while_kept(histories, "npo", 0.55) == 0.0
