"""A grid at the smallest size: its files, no repeated runs, and a verdict that changes with the numbers."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from training.benchmarks.tofu.claims import of_npo
from training.commands import authors, finetune, grid, unlearn
from training.commands.options import build
from training.histories import best_while_kept, ranking


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("grid")
    authors.main(authors.AuthorsOptions(out=home / "data", authors=20, seed=0))
    return home


@pytest.fixture(scope="module")
def options(home):
    """Of a grid in `home`, with changes."""

    def chosen(**changed):
        settings = {
            "data_dir": str(home / "data"), "out": home / "out", "forget_percents": "5", "methods": "ga,npo,npo_rt",
            "seeds": "0,1", "epochs": 2, "finetune_epochs": 2, "hidden_size": 64, "eval_rows": 6, "max_new_tokens": 3,
            "device": "cpu",
        }  # fmt: skip
        return build(grid.GridOptions, **settings | changed)

    return chosen


@pytest.fixture(scope="module")
def metrics(options):
    return grid.main(*options())


def test_every_cell_was_run_and_evaluated(metrics, home):
    assert metrics == json.loads((home / "out" / "metrics.json").read_text())
    cells = {(run["scenario"], run["method"], run["seed"]) for run in metrics["runs"]}
    assert cells == {("forget05", method, seed) for method in ("ga", "npo", "npo_rt") for seed in (0, 1)}
    for run in metrics["runs"]:
        assert [entry["epoch"] for entry in run["history"]] == [0, 1, 2]
        assert all(0 <= entry["forget_quality"] <= 1 for entry in run["history"])
        assert run["history"][0]["forget_quality"] == metrics["start"]["forget05"]["forget_quality"]
    by_seed = [run["history"][-1] for run in metrics["runs"] if run["method"] == "npo"]
    assert by_seed[0] != by_seed[1]  # seeds do something


def test_the_report_shows_what_was_measured_and_no_paths(metrics, home):
    out = home / "out"
    report = (out / "report.md").read_text()
    for name in ("trade_off_forget05.png", "epochs_forget05.png"):
        assert name in report and (out / name).read_bytes().startswith(b"\x89PNG")
    final = [run["history"][-1]["forget_prob"] for run in metrics["runs"] if run["method"] == "npo"]
    assert f"{np.median(final):.3g} [" in report
    for moment in ("before", "GA", "NPO", "NPO+RT"):
        assert f"- {moment}: " in report
    verdicts = re.findall(r"^\| (agrees|\*\*does not agree\*\*) \|", report, re.MULTILINE)
    assert len(verdicts) == (5 if metrics["start"]["forget05"]["model_utility_geometric"] > 0 else 0)
    for name in ("report.md", "report.html", "metrics.json", "config.json"):
        assert str(home) not in (out / name).read_text()


def test_what_is_finished_is_not_run_again(metrics, options, monkeypatch):
    monkeypatch.setattr(unlearn, "run", None)
    monkeypatch.setattr(finetune, "run", None)
    assert grid.main(*options()) == metrics
    console = Console(file=io.StringIO(), width=200)
    assert grid.main(*options(methods="npo"), console) is not None
    assert "report.md was of another choice of runs and is written anew" in console.file.getvalue()
    grid.main(*options())  # the report is of the whole grid again
    with pytest.raises(TypeError):  # a new cell would be
        grid.main(*options(seeds="0,1,2"))


def test_fresh_runs_all_of_it_again(options, tmp_path, monkeypatch):
    """In folders of other settings as well, whose cached references belong to another model."""
    small = {"out": tmp_path, "methods": "npo,npo", "seeds": "0,0", "epochs": 1, "finetune_epochs": 1, "retrain": False}
    assert len(grid.main(*options(**small))["runs"]) == 1  # what is named twice runs once
    with pytest.raises(ValueError, match="by --fresh"):
        grid.main(*options(**small | {"finetune_epochs": 2}))
    assert len(grid.main(*options(**small | {"finetune_epochs": 2, "fresh": True}))["runs"]) == 1


def test_a_dry_run_lists_the_runs(options, capsys, tmp_path):
    assert grid.main(*options(dry_run=True, out=tmp_path / "none", forget_percents="5,10")) is None
    said = capsys.readouterr().out
    assert said.count("unlearn forget05/") == said.count("unlearn forget10/") == 6
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "npo,rmv"}, "--method: expected one of .* got 'rmv'"),
        ({"seeds": "one"}, "--seeds: expected numbers"),
    ],
)
def test_bad_lists_say_so(changed, message, options):
    with pytest.raises(ValueError, match=message):
        grid.Grid(*options(**changed))


def made_up(ga, npo, npo_rt):
    """(summary before, histories) of three methods: (forget quality, utility, retain ROUGE-L) at two evaluations."""

    def history(points):
        keys = ("forget_quality", "model_utility_geometric", "retain_rougeL")
        return [dict(zip(keys, point, strict=True)) for point in [(1e-9, 0.6, 0.0), *points]]

    runs = {"ga": ga, "npo": npo, "npo_rt": npo_rt}
    return {"model_utility_geometric": 0.6}, {method: [history(points)] for method, points in runs.items()}


def test_claims_follow_the_numbers():
    as_in_the_paper = made_up(
        ga=[(0.3, 0.2, 0.5), (1e-12, 0.0, 0.1)],
        npo=[(0.2, 0.4, 0.1), (0.1, 0.3, 0.2)],
        npo_rt=[(0.01, 0.59, 0.0), (0.4, 0.55, 0.1)],
    )
    assert [claim.holds for claim in of_npo(*as_in_the_paper, 5)] == [True] * 5
    the_other_way = made_up(
        ga=[(0.3, 0.55, 0.5), (0.2, 0.5, 0.4)],
        npo=[(1e-9, 0.4, 0.1), (1e-8, 0.3, 0.2)],
        npo_rt=[(1e-9, 0.59, 0.0), (1e-3, 0.2, 0.1)],
    )
    assert [claim.holds for claim in of_npo(*the_other_way, 5)] == [False] * 5
    nobody = made_up(*([(0.9, 0.0, 0.0), (0.9, 0.0, 0.0)] for _ in range(3)))  # keeps anything
    assert [claim.holds for claim in of_npo(*nobody, 5)] == [True, False, False, False, False]
    assert len(of_npo(*the_other_way, 50)) == 3  # the others are of larger retain weights
    assert of_npo({"model_utility_geometric": 0.0}, the_other_way[1], 5) == []  # nothing can be kept


def test_the_best_quality_counts_only_what_was_kept():
    points = [(0.9, 0.6), (0.2, 0.5), (0.8, 0.1)]
    runs = [[{"quality": q, "utility": u} for q, u in points]]
    assert best_while_kept(runs, "quality", "utility", 0.48) == 0.2  # neither the start nor the collapse
    assert best_while_kept(runs, "quality", "utility", 0.55) == 0.0


def test_methods_are_ranked_by_forgetting_among_those_that_keep_enough():
    """Medians at the end; the frontier is of both groups."""

    def runs(*ends):
        return [[{"f": 0.0, "u": 1.0}, {"f": f, "u": u}] for f, u in ends]

    histories = {
        "low": runs((0.9, 0.1), (0.9, 0.3), (0.9, 0.2)),
        "kept": runs((0.1, 0.9), (0.9, 0.9), (0.3, 0.9)),
        "beaten": runs((0.2, 0.85)),
        "best": runs((0.5, 0.8)),
        "lowest": runs((0.95, 0.1)),
    }
    ranks = ranking(histories, "f", "u", 0.8)
    assert [rank.name for rank in ranks] == ["best", "kept", "beaten", "low", "lowest"]
    assert [rank.kept for rank in ranks] == [True, True, True, False, False]
    assert {rank.name for rank in ranks if not rank.on_frontier} == {"beaten"}
    assert ranks[1].forgetting == 0.3 and ranks[3].utility == 0.2
