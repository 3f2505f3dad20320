"""REPORT.md of a study on a pre-trained model: the numbers are those of the records, absent records are said to be."""

import json
import re
import shutil
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tests.training.pretrained_records import CHOICE, WAYS, Study
from training import metrics
from training.benchmarks.tofu.summary import UTILITY_PARTS as PARTS
from training.methods import METHODS
from training.pretrained import figures, labels, noise, report, sides
from training.pretrained.outcomes import Outcomes
from training.pretrained.plan import retrained_on
from training.pretrained.utility import LEAST, known_parts, utility


def few() -> Study:
    """The smallest complete study."""
    ways = {name: WAYS[name] for name in ("ga", "npo", "npo_rt", "simnpo_rt", "dpo_rt")}
    ways |= {"ga": replace(ways["ga"], seeds=(0,))}
    return Study(ways={"forget10": ways, "forget50": {"npo_rt": WAYS["npo_rt"]}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return few().write(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def outcomes(folder) -> Outcomes:
    return Outcomes.read(folder)


@pytest.fixture(scope="module")
def written(folder) -> str:
    report.write(folder)
    return (folder / "REPORT.md").read_text()


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    lines = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_table_of_runs_has_the_numbers_of_the_records(folder, written):
    rows = {tuple(row[i] for i in (0, 1, 3, 4)): row for row in table(written, "All runs") if row[1]}
    records = [json.loads(path.read_text()) for path in (folder / "runs").iterdir()]
    assert len(rows) == len(records)
    utility = json.loads((folder / "models.json").read_text())["retain90"]["summary"]["model_utility_geometric"]
    for record in records:
        weight = "-" if record["retain_weight"] is None else f"{record['retain_weight']:g}"
        row = rows[METHODS[record["method"]].label, record["scenario"], weight, str(record["seed"])]
        kept = [
            c for c in record["checkpoints"] if c["step"] and c["summary"]["model_utility_geometric"] >= 0.9 * utility
        ]
        best = sorted(kept, key=lambda c: c["summary"]["forget_quality"])[-1] if kept else None
        end = record["checkpoints"][-1]["summary"]
        wanted = [end["forget_quality"], *[end["model_utility_geometric"]] * 2]  # with all nine parts, TOFU's as well
        wanted += [best["summary"][key] if best else None for key in ("forget_quality", "model_utility_geometric")]
        wanted += [best["step"] if best else None, end["forget_prob"], end["forget_rougeL"], end["forget_repetition"]]
        shown = ["-" if x is None else str(x) if isinstance(x, int) else f"{x:.3g}" for x in wanted]
        assert row[2] == f"{record['lr']:g}" and row[5:] == shown


def test_the_same_records_give_the_same_bytes(folder, written):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    report.write(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert {"REPORT.md", "answers.md", "trade_off.png", "bars_forget10.png", "collapse.png", "attacks.png"} <= set(
        before
    )


def test_every_picture_and_link_is_there(folder, written):
    for name in re.findall(r"\]\(([^)]+)\)", written):
        assert (folder / name).stat().st_size > 0


def test_a_quick_run_says_that_it_proves_nothing(outcomes, written):
    config = outcomes.config | {"command": outcomes.config["command"] + " --quick"}
    text = report.markdown(replace(outcomes, config=config), {name: [] for name in NO_FIGURES})
    assert text.split("\n\n")[1] == report.QUICK and report.QUICK not in written


def test_sections_are_in_order_and_lines_are_short(written):
    headings = re.findall(r"^## (.*)$", written, re.M)
    assert headings[0].startswith("What agrees") and headings[-1] == "What was run" and len(headings) == 8
    prose = [line for line in written.split("\n") if not line.startswith(("|", "- ", "**", "    ", "!"))]
    assert max(map(len, prose)) <= 120 and "nan" not in written


def test_nothing_at_all_is_a_report_of_nothing(tmp_path):
    report.write(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert {row[0] for row in table(text, "What agrees with the papers, and what does not")} == {"not measured"}
    assert "Nothing was measured yet" in text and text.count("ot measured") > 20
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("gone", ["config.json", "models.json", "choice.json", "answers", "attacks"])
def test_any_record_may_be_absent(tmp_path, gone, monkeypatch):
    monkeypatch.setattr(figures, "write_all", lambda folder, outcomes: {name: [] for name in NO_FIGURES})
    study = few()
    if gone == "attacks":
        study.attacked = ()
    study.write(tmp_path)
    if gone == "answers":
        for path in (tmp_path / "runs").iterdir():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"answers": []}))
    (tmp_path / gone).unlink(missing_ok=True)
    report.write(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "ot measured" in text and "nan" not in text


NO_FIGURES = ("trade_off", "bars", "collapse", "attacks")


def test_figures_of_partial_records_are_drawn(tmp_path):
    """One scenario, no retain model, no choice: what is there is drawn."""
    study = Study(ways={"forget50": {"npo": replace(WAYS["npo"], seeds=(0,))}}, extra=[])
    study.write(tmp_path)
    models = {"full": study.models()["full"]}
    (tmp_path / "models.json").write_text(json.dumps(models))
    found = figures.write_all(tmp_path, Outcomes.read(tmp_path))
    assert found["trade_off"] and found["collapse"] == ["collapse.png"]


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "choice.json").write_text("{")
    with pytest.raises(ValueError, match=r"choice\.json: expected a JSON record"):
        report.write(tmp_path)


def test_costs_come_from_their_module(outcomes, monkeypatch):
    def fake(costs):
        return ["method", "where", "s"], [[name, "cpu", seconds] for name, seconds in costs.items()]

    monkeypatch.setattr(report.costs, "table", fake)
    assert report.costs_section(replace(outcomes, costs={"npo": 3.0})).endswith("| npo | cpu | 3 |")
    assert report.costs_section(replace(outcomes, costs=None)) == "Not measured."


def test_the_choice_is_shown_with_its_rows(written):
    rows = table(written, "How the learning rates and retain weights were chosen")
    assert len(rows) == len(CHOICE) and [row[-1] for row in rows] == ["yes" if c["chosen"] else "" for c in CHOICE]


def test_runs_that_were_set_aside_are_shown_and_count_nowhere(folder, written, tmp_path):
    shutil.copytree(folder, tmp_path / "records")
    record = json.loads(next((folder / "runs").glob("forget10-npo-*")).read_text()) | {"lr": 0.125, "seed": 17}
    (tmp_path / "records/set_aside").mkdir()
    (tmp_path / "records/set_aside/README.md").write_text("why")
    (tmp_path / "records/set_aside/forget10-npo-seed17.json").write_text(json.dumps(record))
    outcomes = Outcomes.read(tmp_path / "records")
    text = report.markdown(outcomes, {name: [] for name in NO_FIGURES})
    assert "| NPO | forget10 | 0.125 | - | 17 |" in text and "set_aside/README.md" in text
    assert "Set aside" not in written
    for heading in ("What agrees with the papers, and what does not", "All runs"):
        assert table(text, heading) == table(written, heading)


def test_seeds_are_said_by_scenario(outcomes):
    assert report.setting_section(outcomes)[-2].replace("\n", " ") == (
        "Seeds: forget10: 3 of NPO, NPO+RT, SimNPO+RT, one of the others; "
        "forget50: 3 of NPO+RT, weight 1, NPO+RT, weight 5."
    )


def test_answers_are_side_by_side(folder, written, outcomes):
    page = (folder / "answers.md").read_text()
    assert page.count("- truth:") == 20  # ten in each scenario
    assert page.count("- NPO+RT: NPO+RT says that the author's full name is Author 3.") == 2
    assert "- before (full model): full says" in page and "- never learned (retain model): retain says" in page
    assert written.count("- truth:") == 3 and written.count("**retain: ") == 1
    shown = sides.side_by_side(outcomes, "forget10")
    assert [*shown] == ["before (full model)", "never learned (retain model)", "GA", "NPO", "NPO+RT", "SimNPO+RT"]


def test_the_chosen_weight_is_the_arm_of_a_method(outcomes):
    assert [arm.retain_weight for arm in outcomes.weights("forget50", "npo_rt")] == [1.0, 5.0]
    assert outcomes.arm("forget50", "npo_rt").retain_weight == 1.0  # of CHOICE
    fives = [{**c, "retain_weight": 5.0} for c in outcomes.choice]
    assert replace(outcomes, choice=fives).arm("forget50", "npo_rt").retain_weight == 5.0
    assert outcomes.label(outcomes.arm("forget50", "npo_rt")) == "NPO+RT, weight 1"
    assert outcomes.label(outcomes.arm("forget10", "npo_rt")) == "NPO+RT"
    assert retrained_on("forget50") == "retain50"


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------


def slow_statistic(first, second) -> int:
    """n D, by counting at every value."""
    return max(abs(sum(a <= x for a in first) - sum(b <= x for b in second)) for x in [*first, *second])


@pytest.mark.parametrize("ties", [False, True])
def test_ks_statistics_are_those_of_counting(ties):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 11)), rng.normal(0.8, size=(6, 11))
    if ties:
        first, second = first.round(), second.round()
    wanted = [slow_statistic(a, b) for a, b in zip(first, second, strict=True)]
    assert noise.statistics(first, second).tolist() == wanted and len(set(wanted)) > 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_p_values_are_those_of_all_orders(n):
    """Of 2n values without ties, every n may be the first sample's with equal chances."""
    orders = [set(some) for some in combinations(range(2 * n), n)]
    reached = [max(abs(2 * sum(j in first for j in range(i)) - i) for i in range(2 * n + 1)) for first in orders]
    for rows in range(n + 1):
        share = sum(statistic >= rows for statistic in reached) / len(orders)
        assert noise.p_value(n, rows) == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("rows", [5, 15, 30, 60])
def test_p_values_are_scipys(rows):
    line = np.arange(60)
    assert noise.p_value(60, rows) == pytest.approx(metrics.forget_quality(line, line + rows - 0.5), rel=1e-9)


def test_all_rows_are_the_test_itself_and_fewer_rows_are_kinder():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=60), rng.normal(1.0, size=60)
    whole = noise.resampled(first, second, 60)
    assert whole.low == whole.median == whole.high == pytest.approx(metrics.forget_quality(first, second))
    medians = [noise.resampled(first, second, n).median for n in (20, 40, 60, 200, 400)]
    assert medians == sorted(medians, reverse=True)
    assert noise.resampled(first, second, 20) == noise.resampled(first, second, 20)


def test_subsamples_are_the_same_rows_of_both_without_replacement():
    """A model against itself is not told apart, whichever rows are drawn."""
    values = np.random.default_rng(2).normal(size=30)
    assert set(noise.resampled(values, values, 10)) == {1.0} and set(noise.resampled(values, values, 90)) == {1.0}
    assert np.isnan(noise.resampled(values, np.full(30, np.nan), 10).median)


def test_what_the_test_can_detect():
    least = noise.detectable_rows(60)
    assert noise.p_value(60, least) <= 0.05 < noise.p_value(60, least - 1)
    grid = np.linspace(-8, 8, 4001)
    from scipy.stats import norm

    shift = noise.detectable_shift(60)
    assert (norm.cdf(grid) - norm.cdf(grid - shift)).max() == pytest.approx(least / 60, abs=1e-4)


def test_the_ceiling_is_one_retain_model_against_the_other(outcomes):
    models = outcomes.models
    ratios = (models[name]["rows"]["log_truth_ratio"] for name in ("retain50_seed1", "retain50"))
    assert noise.ceiling(outcomes, "forget50") == metrics.forget_quality(*ratios)
    assert [*noise.pairs(outcomes, "forget10")] == ["full model", "NPO+RT, best", "retain model, another seed"]


def test_parts_that_a_retain_model_cannot_do_are_left_out_for_all(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "records")
    models = json.loads((folder / "models.json").read_text())
    models["retain50"]["summary"]["ra_rougeL"] = 0.0  # what TOFU's utility would be
    (tmp_path / "records/models.json").write_text(json.dumps(models))
    outcomes = Outcomes.read(tmp_path / "records")
    assert outcomes.parts == tuple(part for part in PARTS if part != "ra_rougeL")
    for measure in (outcomes.models["full"], outcomes.models["retain50"], outcomes.arms["forget10"][0].runs[0].end):
        eight = [measure["summary"][part] for part in outcomes.parts]
        assert measure["summary"]["utility"] == pytest.approx(8 / sum(1 / value for value in eight))
    text = "\n".join(report.utility_section(outcomes)).replace("\n", " ")
    assert "Left out: ROUGE-L of real authors (" in text and ", 0" in text


def test_known_parts():
    low = dict.fromkeys(PARTS, LEAST)
    assert known_parts([]) == known_parts([low]) == PARTS
    assert known_parts([low, low | {"wf_tr": LEAST - 1e-9}]) == PARTS[:-1]
    assert np.isnan(utility({}, PARTS)) and np.isnan(utility(low, ())) and utility(low | {"wf_tr": 0.0}, PARTS) == 0.0


def test_utility_is_held_against_the_same_rows_of_the_retain_model(outcomes):
    retain, other = (outcomes.models[name] for name in ("retain90", "retain90_seed1"))
    assert noise.utility_share([retain], retain, PARTS) == (1.0, 1.0, 1.0)
    lower = retain | {"utility_rows": {k: [0.8 * v for v in values] for k, values in retain["utility_rows"].items()}}
    assert noise.utility_share([lower], retain, PARTS) == pytest.approx((0.8, 0.8, 0.8))
    share = noise.utility_share([other], retain, PARTS)
    utilities = [
        metrics.model_utility([np.mean(values) for values in m["utility_rows"].values()]) for m in (other, retain)
    ]
    assert share.mean == pytest.approx(utilities[0] / utilities[1]) and share.low < share.mean < share.high
    both = noise.utility_share([other, retain], retain, PARTS)  # of two seeds, the mean
    assert both.mean == pytest.approx((share.mean + 1) / 2)
    nothing = retain | {"utility_rows": dict.fromkeys(retain["utility_rows"], [0.0] * 40)}
    assert noise.utility_share([nothing], retain, PARTS) == (0.0, 0.0, 0.0)
    names = ["retain model, another seed", "full model", "NPO+RT, weight 1", "NPO+RT, weight 5"]
    assert [*noise.utility_shares(outcomes, "forget50")] == names


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------


def test_labels_cover_neither_each_other_nor_leave_the_axes(tmp_path):
    from training.reports.figures import drawn

    with drawn(tmp_path / "x.png", size=(5, 4)) as axes:
        axis = axes[0, 0]
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.figure.canvas.draw()
        ends = [labels.Label(f"method {i}", 0.9, 0.5 + 0.01 * i, "black") for i in range(5)]
        labels.place(axis, ends, [(np.array([0.0, 0.9]), np.array([0.5, 0.5]))])
        renderer = axis.figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axis.texts]
        window = axis.get_window_extent()
        assert len(boxes) == 5 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(window.x0 <= b.x0 and b.x1 <= window.x1 for b in boxes)
