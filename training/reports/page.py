"""report.html of a grid: a single file that loads nothing. The same metrics give the same bytes.

The contents are put together here; page.html, page.css and page.js define the layout.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.benchmarks.base import Benchmark
from training.histories import KEPT
from training.reports import charts
from training.reports.entries import MARKS, Model, Number, middle, models_of, numbers_of
from training.reports.run import CAVEAT
from training.store import write_text

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # a question or an answer may be markup
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
NOTHING = "(nothing)"


class Cell(NamedTuple):
    text: str
    value: str = ""  # what the column is sorted by; "" comes last
    spread: str = ""
    title: str = ""


def write_page(path: Path, metrics: dict[str, Any], config: dict[str, Any], benchmarks: Sequence[Benchmark]) -> None:
    """`benchmarks`: one for each scenario, as `training.reports.grid` has them."""
    write_text(path, page(metrics, config, benchmarks))


def page(metrics: dict[str, Any], config: dict[str, Any], benchmarks: Sequence[Benchmark]) -> str:
    """The whole file."""
    methods = len({run["method"] for run in metrics["runs"]})
    return TEMPLATES.get_template("page.html").render(
        title=f"{benchmarks[0].title}: unlearning by {methods} method{'s' * (methods != 1)}",
        what=_what(metrics, any(benchmark.follows for benchmark in benchmarks)),
        facts=_facts(metrics, config),
        caveat=CAVEAT.split("`"),  # every second part is code
        scenarios=[_scenario(metrics, benchmark) for benchmark in benchmarks],
        settings={name: value for name, value in config["settings"].items() if value not in (None, "")},
        versions=config["versions"],
        command=config["command"],
    )


def _what(metrics: Mapping[str, Any], in_turn: bool) -> str:
    """`in_turn`: requests come one after another."""
    first = (
        "Every method started from one model that had learned all rows, to take back what it learned of the rows to "
        "forget and to leave the rest as it was. "
    )
    if in_turn:
        first += "Each further request starts from the model that the same method left at the one before. "
    if any(metrics["retrained"].values()):
        return first + "The retrained model never saw those rows: a method is good where its numbers are near to it."
    return first + "No model was trained without those rows here, so the numbers stand beside those before."


def _facts(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    seeds = len({run["seed"] for run in metrics["runs"]})
    settings = config["settings"]
    facts = [f"{seeds} seeds" if seeds > 1 else "one seed"]
    facts += [f"{split}: {rows} rows" for split, rows in metrics["rows"].items()]
    facts += [f"{name} {settings[name]}" for name in ("preset", "model", "epochs", "lr") if settings.get(name)]
    return [*facts, config["device"]]


def _scenario(metrics: Mapping[str, Any], benchmark: Benchmark) -> dict[str, Any]:
    models = models_of(metrics, benchmark)
    numbers = numbers_of(models, benchmark)
    keys = benchmark.trade_off
    plot = charts.plot(models, keys, numbers) if keys else None
    attacks = list(dict.fromkeys(number.attack for number in numbers if number.attack))
    panels = [
        charts.panel(models, number, [n for n in numbers if n.attack and n.key == number.key])
        for number in numbers
        if not number.attack
    ]
    histories = {model.id: model.histories for model in models if model.colour}
    return {
        "name": benchmark.scenario,
        "legend": benchmark.legend,
        "models": models,
        "numbers": numbers,
        "table": [(model, [_cell(model, number) for number in numbers]) for model in models],
        "seeds": max(len(model.seeds) for model in models),
        "ranked": any(model.place for model in models),
        "kept": f"{KEPT:.0%}",
        "marks": [mark for mark in MARKS.values() if any(model.mark == mark for model in models)],
        "glyphs": dict(zip(attacks, cycle("◆▲■▼✚"), strict=False)),
        "plot": plot,
        "panels": panels,
        "claims": benchmark.claims(metrics["start"][benchmark.scenario], histories),
        "questions": _questions(metrics["samples"].get(benchmark.scenario, {}), models),
    }


def _cell(model: Model, number: Number) -> Cell:
    values = model.values(number)
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return Cell("–", title="not measured")
    centre = middle(found)
    spread = f"{min(found):.3g} to {max(found):.3g}" if min(found) != max(found) else ""
    by_seed = ", ".join(f"seed {seed}: {value:.3g}" for seed, value in zip(model.seeds, values, strict=True))
    return Cell(f"{centre:.3g}", repr(centre), spread, by_seed if len(values) > 1 else "")


def _questions(samples: Mapping[str, Sequence[Mapping[str, str]]], models: Sequence[Model]) -> list[dict[str, Any]]:
    """The same questions of every moment, those of the methods in the order of the tables."""
    by_label = {model.label: model for model in models}
    order = {model.label: place for place, model in enumerate(models)}
    moments = sorted(samples, key=lambda moment: order.get(moment, -1))
    return [
        {
            "set": rows[0]["set"],
            "question": rows[0]["question"],
            "truth": rows[0]["answer"],
            "answers": [
                {"moment": moment, "model": by_label.get(moment), "pieces": shared(row["generation"], row["answer"])}
                for moment, row in zip(moments, rows, strict=True)
            ],
        }
        for rows in zip(*(samples[moment] for moment in moments), strict=True)
    ]


def shared(answer: str, truth: str) -> list[tuple[str, bool]]:
    """`answer` in pieces of whole words: (text, whether the truth has these words in this order)."""
    words, wanted = answer.split(), truth.split()
    if not words:
        return [(NOTHING, False)]
    matcher = difflib.SequenceMatcher(None, [*map(_plain, words)], [*map(_plain, wanted)], autojunk=False)
    pieces, done = [], 0
    for start, _, length in matcher.get_matching_blocks():  # the last one is empty, at the end
        pieces += [(" ".join(words[done:start]), False), (" ".join(words[start : start + length]), True)]
        done = start + length
    return [piece for piece in pieces if piece[0]]


def _plain(word: str) -> str:
    return re.sub(r"\W", "", word).lower() or word
