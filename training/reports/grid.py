"""report.md of a grid: tables over seeds, claims of papers, answers side by side, what was run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.benchmarks.base import Benchmark, Claim, TradeOff
from training.histories import KEPT, Histories, best_while_kept, histories_of, over_seeds, ranking
from training.methods import METHODS
from training.reports import tables
from training.reports.figures import plot_over_epochs, plot_trade_off
from training.reports.page import write_page
from training.reports.requests import requests_section
from training.reports.run import ATTACKED, CAVEAT
from training.store import write_json, write_text

LOST = 0.2  # share of a number before unlearning that counts as lost
SIDE_BY_SIDE = 5  # methods whose answers a report shows
RANKED = 8  # methods from which on a report ranks them


def write_grid_report(
    out: Path, metrics: dict[str, Any], config: dict[str, Any], benchmarks: Sequence[Benchmark]
) -> None:
    """metrics.json, config.json, report.md, report.html, two figures for each scenario, which `benchmarks` has, and one
    for a series of them."""
    write_json(out / "metrics.json", metrics)
    write_json(out / "config.json", config)
    for benchmark in benchmarks:
        _figures(out, metrics, benchmark)
    write_text(out / "report.md", _markdown(metrics, config, benchmarks, requests_section(out, metrics, benchmarks)))
    write_page(out / "report.html", metrics, config, benchmarks)


def _traded(benchmark: Benchmark, start: Mapping[str, Any]) -> TradeOff | None:
    """The two metrics of the trade-off, if both were measured."""
    keys = benchmark.trade_off
    return keys if keys and all(start.get(key) is not None for key in keys) else None


def _figures(out: Path, metrics: dict[str, Any], benchmark: Benchmark) -> None:
    name = benchmark.scenario
    histories, start, retrained = histories_of(metrics, name), metrics["start"][name], metrics["retrained"].get(name)
    title = f"{benchmark.title}, {name}" + ("; dotted: the retrained model, and p = 0.05" if retrained else "")
    plot_over_epochs(histories, benchmark.columns, title, out / f"epochs_{name}.png", retrained)
    if keys := _traded(benchmark, start):
        moments = len(next(iter(histories.values()))[0])
        shown = "epoch by epoch" if moments > 2 else "before and after"
        title, path = f"{benchmark.title}, {name}: {shown}", out / f"trade_off_{name}.png"
        plot_trade_off(histories, keys, benchmark.columns, title, path, start, retrained)


def _markdown(
    metrics: dict[str, Any], config: dict[str, Any], benchmarks: Sequence[Benchmark], requests: Sequence[str]
) -> str:
    number = len(set(_methods(metrics)))
    by = "one method" if number == 1 else f"{number} methods"
    sections = [f"# {benchmarks[0].title}: unlearning by {by}", *requests]
    for benchmark in benchmarks:
        sections += _scenario(metrics, benchmark)
    sections += ["## What was run", _facts(metrics, config), CAVEAT]
    return "\n\n".join(section for section in sections if section) + "\n"


def _methods(metrics: dict[str, Any]) -> list[str]:
    return [run["method"] for run in metrics["runs"]]


def _scenario(metrics: dict[str, Any], benchmark: Benchmark) -> list[str]:
    name = benchmark.scenario
    histories, start = histories_of(metrics, name), metrics["start"][name]
    seeds = len(next(iter(histories.values())))
    of_seeds = f"medians over {seeds} seeds [smallest, largest]" if seeds > 1 else "one seed"
    measured = _traded(benchmark, start) is not None
    claims = benchmark.claims(start, histories)
    chosen = list(metrics["samples"].get(name, {}).items())[: SIDE_BY_SIDE + 1]
    return [
        f"## {name}",
        what_to_see(start, histories),
        f"![Forgetting against utility](trade_off_{name}.png)" if measured else "",
        f"![Over the epochs](epochs_{name}.png)",
        f"At the end of unlearning, {of_seeds}."
        + (f" Last column: the best among the epochs that keep {KEPT:.0%} of the utility." if measured else ""),
        _table(metrics, benchmark, histories),
        benchmark.legend,
        _ranking(metrics, benchmark, histories) if measured and len(histories) >= RANKED else "",
        *_after_attacks(metrics, benchmark),
        "What the paper says, against these numbers:\n\n" + _verdicts(claims) if claims else "",
        f"### Greedy answers, {name}, seed {metrics['runs'][0]['seed']}" if chosen else "",
        tables.samples(dict(chosen)) if chosen else "",
    ]


def what_to_see(start: Mapping[str, Any], histories: Histories) -> str:
    """A paragraph computed from the numbers, for any outcome: probabilities of forget and retain answers."""
    keys = ("forget_prob", "retain_prob")
    if not all(start.get(key) for key in keys):
        return ""
    forget0, retain0 = (start[key] for key in keys)
    sentences = [
        f"Before, the model gives the true answers a probability of {forget0:.2g} on what is to be forgotten and "
        f"{retain0:.2g} on what is to be kept."
    ]
    if len(histories) >= RANKED:
        return sentences[0]  # the ranking says the rest
    for name, runs in histories.items():
        forget, retain = (float(np.median(over_seeds(runs, key)[:, -1])) for key in keys)
        sentences.append(
            f"{METHODS[name].label} takes them to {forget:.2g} and {retain:.2g}: what was to be forgotten is "
            f"{_state(forget / forget0)}, what was to be kept is {_state(retain / retain0)}."
        )
    return " ".join(sentences)


def _state(share: float) -> str:
    return "kept" if share > KEPT else "lost" if share < LOST else "damaged"


def _table(metrics: dict[str, Any], benchmark: Benchmark, histories: Histories) -> str:
    name = benchmark.scenario
    start, retrained = metrics["start"][name], metrics["retrained"].get(name)
    shown = {key: c.heading for key, c in benchmark.columns.items() if start.get(key) is not None and not c.detail}
    trade_off = _traded(benchmark, start)
    best = trade_off is not None
    rows: list[list[Any]] = [["before", *(start[key] for key in shown), *[""] * best]]
    if retrained:
        rows.append(["retrained", *(retrained.get(key) for key in shown), *[""] * best])
    for method, runs in histories.items():
        row: list[Any] = [METHODS[method].label, *(_spread(over_seeds(runs, key)[:, -1]) for key in shown)]
        if trade_off:
            least = KEPT * start[trade_off.utility]
            row.append(best_while_kept(runs, trade_off.forgetting, trade_off.utility, least) or "-")
        rows.append(row)
    last = [f"best, {KEPT:.0%} kept"] if best else []
    return tables.markdown(["model", *shown.values(), *last], rows)


def _ranking(metrics: dict[str, Any], benchmark: Benchmark, histories: Histories) -> str:
    """Forgetting against utility, in one order."""
    name, keys = benchmark.scenario, benchmark.trade_off
    assert keys is not None  # it is measured
    least = KEPT * metrics["start"][name][keys.utility]
    rows = []
    for place, rank in enumerate(ranking(histories, keys.forgetting, keys.utility, least), 1):
        method, runs = METHODS[rank.name], histories[rank.name]
        numbers = (_spread(over_seeds(runs, key)[:, -1]) for key in (keys.forgetting, keys.utility))
        frontier = "yes" if rank.on_frontier else ""
        kept = "yes" if rank.kept else "**no**"
        rows.append([place, method.label, method.source, method.cost, *numbers, kept, frontier])
    measured = (benchmark.columns[key].heading for key in (keys.forgetting, keys.utility))
    headings = ["", "method", "source", "cost", *measured, f"keeps {KEPT:.0%}", "frontier"]
    table = tables.markdown(headings, rows, text=4)
    return "\n\n".join(
        [
            f"### Ranking, {name}",
            f"First the methods that keep {KEPT:.0%} of the utility, by forgetting; then the others, by utility. "
            "Frontier: no other method is better in one and as good in the other. All have the same learning rate and "
            "number of epochs; a method's constants are its own where no option gives them.",
            table,
        ]
    )


def _after_attacks(metrics: dict[str, Any], benchmark: Benchmark) -> list[str]:
    """Heading and table of what tells of forgetting, medians over seeds: a line a method; or nothing."""
    name, start = benchmark.scenario, metrics["start"][benchmark.scenario]
    shown = {key: c.heading for key, c in benchmark.columns.items() if start.get(key) is not None and not c.detail}
    forgetting = benchmark.trade_off.forgetting if benchmark.trade_off else ""
    told = {key: heading for key, heading in shown.items() if key.startswith("forget_") or key == forgetting}
    summaries: dict[str, list[dict[str, Any]]] = {}  # {method: of each seed {attack: summary}}
    for run in metrics["runs"]:
        if run["scenario"] == name and run.get("attacks"):
            found = {"": run["history"][-1], **run["attacks"]}
            summaries.setdefault(METHODS[run["method"]].label, []).append(found)
    if not (told and summaries):
        return []
    attacks = next(iter(summaries.values()))[0]
    pairs = [(key, attack) for key in told for attack in attacks]
    headings = [f"{told[key]}, {attack}" if attack else told[key] for key, attack in pairs]
    rows = [
        [label, *(float(np.median([some[attack][key] for some in seeds])) for key, attack in pairs)]
        for label, seeds in summaries.items()
    ]
    return [f"### {ATTACKED}, {name}", tables.markdown(["model", *headings], rows)]


def _spread(values: np.ndarray) -> str:
    middle = f"{np.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} [{values.min():.2g}, {values.max():.2g}]"


def _verdicts(claims: list[Claim]) -> str:
    rows = [["agrees" if c.holds else "**does not agree**", c.text, c.measured] for c in claims]
    return tables.markdown(["", "claim", "measured"], rows, text=3)


def _facts(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    zero = next((run["step_zero"] for run in metrics["runs"] if run.get("step_zero")), None)
    lines = [
        "- Rows learned: " + ", ".join(f"{split} {n}" for split, n in metrics["rows"].items()) + ".",
        f"- Settings: {tables.settings_line(config['settings'])}.",
        f"- Before the first step: NPO loss {zero['loss']:.6f}, (2/beta) ln 2 = {zero['expected_loss']:.6f}, largest "
        f"log-ratio to the cached reference {zero['max_abs_log_ratio']:.1e}." if zero else "",
        f"- {config['device']}; {tables.settings_line(config['versions'])}.",
    ]  # fmt: skip
    return "\n".join(line for line in lines if line)
