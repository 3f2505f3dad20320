"""The page of a grid: it has all measurements, model output never becomes markup, and a browser can show it."""

import html
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import pytest

from training.benchmarks.base import Benchmark, Column, TradeOff
from training.commands import grid
from training.commands import page as page_command
from training.commands.options import build, parse
from training.commands.run_folder import public
from training.histories import ranking
from training.methods import METHODS
from training.reports import charts
from training.reports.entries import Number, models_of
from training.reports.grid import histories_of, write_grid_report
from training.reports.page import page, shared

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
browser = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass(frozen=True)
class QuizOptions:
    forget_percent: Annotated[int, "forget set"] = 10


class Quiz(Benchmark):
    """Numbers of every sort: a p-value, a detail, one that goes below 0 and far above 1, one that nothing has."""

    name, Options, title, legend = "quiz", QuizOptions, "Quiz", "Leak: 0 is best."
    columns = {  # noqa: RUF012
        "leak": Column("leak", "leak, %"),
        "p": Column("p", p_value=True),
        "forget_prob": Column("forget prob", "probability, forget"),
        "forget_fine": Column("forget fine", detail=True),
        "utility": Column("utility"),
        "never": Column("never measured"),
    }
    trade_off = TradeOff("utility", "p")


class Untraded(Quiz):
    trade_off = None


HEADINGS = ["leak", "p", "forget prob", "forget fine", "utility"]
AFTER = ["p, int4", "forget prob, int4", "p, relearned", "forget prob, relearned"]


def summary(rng: np.random.Generator, **changed: Any) -> dict[str, Any]:
    numbers = {"leak": 120 * rng.random() - 60, "p": 10 ** -(9 * rng.random()), "never": None}
    return numbers | {key: rng.random() for key in ("forget_prob", "forget_fine", "utility")} | changed


def made_up(methods=("npo_rt", "ga", "npo_kl", "rmu"), seeds=(0, 1, 2), scenarios=("forget05", "forget10")):
    rng = np.random.default_rng(0)
    start = {name: summary(rng, p=1e-12, utility=0.9) for name in scenarios}
    runs = [
        {
            "scenario": name, "method": method, "seed": seed, "step_zero": None,
            "history": [{"epoch": epoch, **(summary(rng) if epoch else start[name])} for epoch in range(3)],
            "rounded": {"int4": summary(rng)}, "attacks": {"relearned": summary(rng)},
        }
        for name in scenarios for method in methods for seed in seeds
    ]  # fmt: skip
    said = {"question": "Who wrote Dune?", "answer": "Frank Herbert wrote it.", "set": "forget"}
    moments = ["before", *(METHODS[method].label for method in methods)]
    samples = {
        name: {m: [{**said, "generation": f"{name} {m} wrote it {i}."} for i in range(2)] for m in moments}
        for name in scenarios
    }
    retrained = {name: summary(rng, p=None) for name in scenarios}
    return {"rows": {"full": 90}, "start": start, "retrained": retrained, "runs": runs, "samples": samples}


CONFIG = {
    "settings": {"benchmark": "quiz", "lr": 1e-3},
    "command": "python -m training.grid --lr 0.001",
    "device": "cpu",
    "versions": {"python": "3"},
}
BOTH = [Quiz(QuizOptions(5)), Quiz(QuizOptions(10))]


class Element:
    """A node of a page, as a browser's parser closes it; text nodes are strings."""

    def __init__(self, tag: str, attributes: dict[str, str | None]):
        self.tag, self.attributes, self.children = tag, attributes, []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", cls: str = "") -> "list[Element]":
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                found += [child] * ((not tag or child.tag == tag) and (not cls or cls in classes))
                found += child.all(tag, cls)
        return found


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1  # all is closed
    return reader.open[0]


def rows_of(table: Element) -> dict[str, list[str]]:
    """{method: its cells}"""
    found = {}
    for body in table.all("tbody"):
        for row in body.all("tr"):
            found[row.all("th")[0].text.strip()] = [cell.text for cell in row.all("td")]
    return found


# ------------------------------------------------------------------ what is on it


def test_every_method_every_column_and_every_sample_is_there():
    metrics = made_up()
    root = read(page(metrics, CONFIG, BOTH))
    sections = root.all("section")
    assert [section.attributes["id"] for section in sections] == ["forget05", "forget10"]
    for section in sections:
        name = section.attributes["id"]
        (table,) = section.all("table", "numbers")
        assert [th.text for th in table.all("thead")[0].all("th")] == ["method", "place", *HEADINGS, *AFTER]
        rows = rows_of(table)
        assert list(rows)[:2] == ["before", "retrained"] and len(table.all("tbody", "pinned")[0].all("tr")) == 2
        assert set(rows) == {"before", "retrained", "NPO+RT", "GA", "NPO+KL", "RMU"}
        assert rows["before"][1:] == [cell(metrics["start"][name][key]) for key in list(Quiz.columns)[:5]] + ["–"] * 4
        for method in ("npo_rt", "ga", "npo_kl", "rmu"):
            runs = [run for run in metrics["runs"] if (run["scenario"], run["method"]) == (name, method)]
            wanted = [spread([run["history"][-1][key] for run in runs]) for key in list(Quiz.columns)[:5]]
            for attacked in ([run["rounded"]["int4"] for run in runs], [run["attacks"]["relearned"] for run in runs]):
                wanted += [spread([found[key] for found in attacked]) for key in ("p", "forget_prob")]
            assert rows[METHODS[method].label][1:] == wanted
        assert len(section.all("div", "panels")[0].all("figure")) == len(HEADINGS)
        for panel in section.all("div", "panels")[0].all("figure"):
            assert [row.all("span")[0].text for row in panel.all("div", "row")][:-1] == list(rows)
        said = [box.text.split() for box in section.all("div", "answers")]
        assert len(said) == 2
        for i, words in enumerate(said):
            for moment, answers in metrics["samples"][name].items():
                assert " ".join(answers[i]["generation"].split()) in " ".join(words), moment
        assert {option.text for option in section.all("option")} == {"all methods", *rows} - {"before", "retrained"}
        assert {g.all("title")[0].text.split(":")[0] for g in section.all("g", "own")} == set(rows)
    assert "Leak: 0 is best." in root.text and "1 method" not in root.text
    assert "Unlearning is no guarantee" in root.text and "--lr 0.001" in root.text


def cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def spread(values: list[float]) -> str:
    return f"{np.median(values):.3g}{min(values):.3g} to {max(values):.3g}"


def test_methods_stand_in_the_order_of_the_ranking():
    metrics = made_up(scenarios=("forget10",))
    for run in metrics["runs"]:
        run["history"][-1]["utility"] += 0.5 if run["method"] in ("ga", "rmu") else 0.0
    ranks = ranking(histories_of(metrics, "forget10"), "p", "utility", 0.8 * 0.9)
    wanted = [METHODS[rank.name].label for rank in ranks]
    models = models_of(metrics, BOTH[1])[2:]
    assert [model.label for model in models] == wanted and [model.place for model in models] == [1, 2, 3, 4]
    assert {model.kept for model in models} == {True, False}
    metrics["runs"][0]["history"][-1]["p"] = math.nan  # of the first method: it has no place, and is the last
    models = models_of(metrics, BOTH[1])[2:]
    assert [model.place for model in models] == [1, 2, 3, None] and models[-1].id == metrics["runs"][0]["method"]
    assert [m.id for m in models_of(metrics, Untraded(QuizOptions(10)))[2:]] == ["npo_rt", "ga", "npo_kl", "rmu"]


def test_what_a_model_says_is_text():
    said = {"question": "</script><b>", "answer": "a 'quoted\" & </style> answer", "set": "<i>"}
    metrics = made_up(methods=("npo",), seeds=(0,), scenarios=("forget10",))
    metrics["samples"]["forget10"] = {
        "before": [{**said, "generation": "<script>alert('1')</script> & \"that\""}],
        "NPO": [{**said, "generation": "<img src=x onerror=alert(1)>"}],
    }
    config = CONFIG | {"settings": {"benchmark": "quiz", "model": "<u>'\"&"}}
    text = page(metrics, config, BOTH[1:])
    root = read(text)
    assert len(root.all("script")) == len(root.all("style")) == 1
    assert not root.all("img") and not root.all("u") and "alert(1)>" in root.text
    for written in (*said.values(), "<script>alert('1')</script> & \"that\"", "<u>'\"&"):
        assert written in root.text
    plain = read(page(made_up(methods=("npo",), seeds=(0,), scenarios=("forget10",)), CONFIG, BOTH[1:]))
    assert plain.all("script")[0].text == root.all("script")[0].text


def test_nothing_is_fetched_and_the_same_metrics_give_the_same_bytes():
    metrics = made_up()
    text = page(metrics, CONFIG, BOTH)
    assert text == page(json.loads(json.dumps(metrics)), json.loads(json.dumps(CONFIG)), BOTH)
    for element in read(text).all():
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (element.attributes.get(name) or "#").startswith("#"), element.tag
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "img")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(|https?://", text)


MISSING = (
    *("seed", "attacks", "retrained", "samples", "trade_off", "nan", "inf", "none", "zero", "same", "ragged"),
    *("unmeasured", "absent"),
)


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_leaves_its_place_empty(what):
    benchmark = (Untraded if what == "trade_off" else Quiz)(QuizOptions(10))
    metrics = made_up(("ga", "npo"), (0,) if what == "seed" else (0, 1), ("forget10",))
    ends = [run["history"][-1] for run in metrics["runs"] if run["method"] == "ga"]
    if what == "attacks":
        metrics["runs"] = [{k: v for k, v in run.items() if k not in ("attacks", "rounded")} for run in metrics["runs"]]
    elif what == "retrained":
        metrics["retrained"] = {}
    elif what == "samples":
        metrics["samples"] = {}
    elif what in ("nan", "inf", "none"):
        for end in ends:
            end.update(dict.fromkeys(("p", "leak", "utility"), None if what == "none" else float(what)))
    elif what == "zero":
        ends[0].update(p=0.0, utility=0.0)
    elif what == "same":  # every number of every model
        for summary in (*metrics["start"].values(), *(e for run in metrics["runs"] for e in run["history"])):
            summary.update(p=1.0, utility=0.5, leak=0.0)
    elif what == "ragged":
        del metrics["runs"][0]["history"][1]
    elif what == "unmeasured":
        metrics["start"]["forget10"]["p"] = None
    elif what == "absent":
        for end in ends:
            del end["forget_prob"], end["p"]
    text = page(metrics, CONFIG, [benchmark])
    root = read(text)
    assert not re.search(r'="[^"]*(nan|inf|None)[^"]*"', text.split("<main>")[1])
    rows = rows_of(root.all("table", "numbers")[0])
    assert len(rows) == 4 - (what == "retrained")
    assert bool(root.all("div", "plot")) == (what not in ("trade_off", "unmeasured"))
    assert bool(root.all("article")) == (what != "samples")
    if what in ("nan", "inf", "none"):
        assert [rows["GA"][i] for i in (0, 1, 2, 5)] == ["", "–", "–", "–"]
        assert "GA" not in {g.all("title")[0].text.split(":")[0] for g in root.all("g", "own")}
        assert rows["NPO"][0].startswith("1")


def test_one_seed_that_was_not_measured_leaves_the_others():
    metrics = made_up(("ga",), (0, 1, 2), ("forget10",))
    for run, value in zip(metrics["runs"], (0.25, None, 0.75), strict=True):
        run["history"][-1]["leak"] = value
    (row,) = [r for r in read(page(metrics, CONFIG, BOTH[1:])).all("tr") if r.all("th")[0].text.strip() == "GA"][:1]
    found = row.all("td")[1]
    assert found.text == "0.50.25 to 0.75" and found.attributes["title"] == "seed 0: 0.25, seed 1: nan, seed 2: 0.75"


# ------------------------------------------------------------------ where it is drawn


def test_axes_place_what_they_are_given():
    values = [-30.0, 5.0, 70.0]
    axis = charts.axis_from_zero(values, log=False).marked(4)
    for value in (*values, 0.0):
        assert axis.at(value) == pytest.approx(100 * (value - axis.low) / (axis.high - axis.low), abs=0.01)
        assert 0 <= axis.at(value) <= 100
    assert (axis.at(0.0), "0") in axis.ticks
    assert charts.axis_from_zero([0.2, 0.7], log=False).at(0.0) == 0.0
    p_values = charts.axis_from_zero([1e-7, 0.3], log=True).marked(4)
    assert p_values.at(1.0) == 100 and p_values.at(1e-7) == 0 and p_values.at(10**-3.5) == 50
    assert p_values.ticks[-1][1] == "1" and "10⁻⁶" in [text for _, text in p_values.ticks]
    around = charts.axis_around([0.4, 0.6], log=False)
    assert 0 < around.at(0.4) < 10 and 90 < around.at(0.6) < 100
    assert 0 <= charts.axis_around([0.0], log=True).at(0.0) < charts.axis_around([0.0], log=True).at(0.05) < 100


def test_labels_that_have_room_do_not_overlap():
    metrics = made_up(tuple(METHODS)[:40], (0,), ("forget10",))
    numbers = [Number(key, column) for key, column in Quiz.columns.items()]
    marks = charts.plot(models_of(metrics, BOTH[1]), Quiz.trade_off, numbers)["marks"]
    assert len(marks) == 42
    boxes = []
    for mark in marks:
        x, y = mark["end"][0] / 100 * charts.WIDTH, mark["end"][1] / 100 * charts.HEIGHT
        width, side = charts.LETTER * len(mark["model"].label), mark["label"]
        left = x + side["dx"] - {"start": 0, "middle": width / 2, "end": width}[side["anchor"]]
        boxes.append((left, y + side["dy"] - 9, left + width, y + side["dy"] + 2))
    shown = [box for box, mark in zip(boxes, marks, strict=True) if mark["fits"]]
    assert len(shown) > 10
    for a, b in combinations(shown, 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_words_of_the_truth_are_marked_in_their_order():
    pieces = shared("Frank  Herbert never wrote\nit, Herbert.", "frank herbert wrote it")
    assert pieces == [("Frank Herbert", True), ("never", False), ("wrote it,", True), ("Herbert.", False)]
    assert shared(" \n", "truth") == [("(nothing)", False)]
    assert shared("no such", "truth") == [("no such", False)] and shared("- ?", "- ?") == [("- ?", True)]


# ------------------------------------------------------------------ commands


def settings_of(options, benchmark) -> dict[str, Any]:
    return public(options, benchmark.options)


def test_the_command_runs_a_grid_with_the_same_settings():
    chosen = build(
        grid.GridOptions, preset="methods", methods="npo_rt,ga", retrain=False, world=True, forget_percents="1,5",
        lr=1e-4, rounded="",
    )  # fmt: skip
    settings = settings_of(*chosen)
    words = shlex.split(grid.command_of(settings))
    assert words[:3] == ["python", "-m", "training.grid"] and "--seeds" not in words  # those of the preset
    assert settings_of(*parse(grid.GridOptions, "training.grid", "", words[3:])) == settings
    for changed in ({"model": "some/model"}, {"preset": "phi-1.5"}, {"benchmark": "authors", "authors": 9}):
        settings = settings_of(*build(grid.GridOptions, **changed))
        words = shlex.split(grid.command_of(settings))[3:]
        assert settings_of(*parse(grid.GridOptions, "training.grid", "", words)) == settings
        assert len(words) <= 6 and "None" not in words


def test_the_page_is_written_from_the_files_of_a_grid(tmp_path, capsys):
    metrics = {"rows": {"full": 9}, "start": {}, "retrained": {}, "runs": [], "samples": {}}
    for name in ("forget05", "forget10"):
        metrics["start"][name] = {"forget_prob": 0.9, "retain_prob": 0.9}
        history = [{"epoch": epoch, "forget_prob": 0.9 - epoch / 2, "retain_prob": 0.9} for epoch in range(2)]
        metrics["runs"].append({"scenario": name, "method": "ga", "seed": 0, "history": history})
    chosen = build(grid.GridOptions, benchmark="authors", forget_percents="5,10", methods="ga", seeds="0")
    settings = settings_of(*chosen)
    config = {"settings": settings, "command": grid.command_of(settings), "device": "cpu", "versions": {}}
    write_grid_report(tmp_path, metrics, config, grid.scenarios(chosen[1], "5,10"))
    written = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert page_command.main(page_command.PageOptions(tmp_path)) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == written and str(tmp_path) in capsys.readouterr().out

    def refused(match, **files):
        for name, content in ({"metrics": metrics, "config": config} | files).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            page_command.main(page_command.PageOptions(tmp_path))

    runs = metrics["runs"]
    refused("expected metrics.json and config.json of training.grid", metrics={"history": []})
    refused("expected metrics.json and config.json of training.grid", config={"settings": {"lr": 1}})
    refused("an object in config.json, got list", config=[1])
    refused("methods of the registry, got mine", metrics=metrics | {"runs": [*runs, runs[0] | {"method": "mine"}]})
    refused("config.json is of forget05, forget10, metrics.json of forget05", metrics=metrics | {"runs": runs[:1]})
    with pytest.raises(ValueError, match=r"--results .*expected metrics\.json of training\.grid in it"):
        page_command.main(page_command.PageOptions(tmp_path / "nowhere"))


# ------------------------------------------------------------------ in a browser

PROBE = """
<body>FRAMES<pre id="found"></pre><script>
const methods = (rows) => [...rows].map((row) => row.dataset.model);
const order = (page) => methods(page.querySelector("table.numbers").tBodies[1].rows);
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, table = page.querySelector("table.numbers");
    const heading = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "leak");
    const number = { wide: page.documentElement.scrollWidth, window: frame.contentWindow.innerWidth };
    number.before = order(page);
    const button = heading.querySelector("button");
    button.click(); number.down = order(page); number.sort = heading.getAttribute("aria-sort");
    button.click(); number.up = order(page);
    number.pinned = methods(table.tBodies[0].rows);
    page.querySelector(".key li[data-model=ga]").focus();
    number.on = page.querySelectorAll("tr.on").length;
    const chosen = page.querySelector("select.chosen");
    chosen.value = "ga"; chosen.dispatchEvent(new Event("change"));
    const boxes = [...page.querySelectorAll("article:first-of-type .answers > div")];
    number.shown = boxes.filter((box) => box.offsetWidth).map((box) => box.dataset.model || "truth");
    found[frame.width] = number;
  }
  document.querySelector("#found").textContent = JSON.stringify(found);
});
</script></body>
"""


@pytest.mark.skipif(browser is None, reason=f"none of {', '.join(BROWSERS)} is installed")
def test_a_browser_shows_it_within_the_width_of_a_phone_and_sorts_it(tmp_path):
    metrics = made_up(("npo_rt", "ga", "npo_kl", "rmu"), (0, 1), ("forget10",))
    for run, value in zip(metrics["runs"], (9, 9, 10, 10, -100, -100, None, None), strict=True):  # 10 > 9 > -100
        run["history"][-1]["leak"] = value
    for rows in metrics["samples"]["forget10"].values():
        rows[0]["generation"] = "rofess" * 90
    settings = {"benchmark": "quiz", "methods": "npo_rt," * 40}
    text = page(metrics, CONFIG | {"settings": settings}, BOTH[1:]).replace("<details>", "<details open>")
    frame = '<iframe width="{}" height="900" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, html.escape(text)) for width in (390, 1400))
    (tmp_path / "probe.html").write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    assert found.keys() == {"390", "1400"}
    for number in found.values():
        assert number["wide"] <= number["window"]
        assert number["down"] == ["ga", "npo_rt", "npo_kl", "rmu"] and number["sort"] == "descending"
        assert number["up"] == ["npo_kl", "npo_rt", "ga", "rmu"]  # what was not measured stays last
        assert number["before"] != number["down"] and set(number["before"]) == set(number["down"])
        assert number["pinned"] == ["before", "retrained"] and number["shown"] == ["truth", "before", "ga"]
