"""A series of scenarios side by side: growing forget sets, or successive requests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.benchmarks.base import Benchmark, Column
from training.histories import at_end, histories_of, over_seeds
from training.methods import METHODS
from training.reports import tables
from training.reports.figures import INK, drawn, panels_of, style

BEFORE = "before"


def in_series(benchmarks: Sequence[Benchmark]) -> dict[str, list[Benchmark]]:
    """{name of a series: its scenarios}, of those with more than one."""
    found: dict[str, list[Benchmark]] = {}
    for benchmark in benchmarks:
        if benchmark.series:
            found.setdefault(benchmark.series, []).append(benchmark)
    return {name: members for name, members in found.items() if len(members) > 1}


def requests_section(out: Path, metrics: Mapping[str, Any], benchmarks: Sequence[Benchmark]) -> list[str]:
    """Heading, figure and table of each series, and `out`/requests_SERIES.png; nothing where there is none."""
    sections = []
    for series, members in in_series(benchmarks).items():
        names, columns = [b.scenario for b in members], members[0].columns
        runs = {name: histories_of(metrics, name) for name in names}
        shown = panels_of(
            columns, [history for found in runs.values() for seeds in found.values() for history in seeds]
        )
        if not shown:
            continue
        file = f"requests_{series}.png"
        _figure(out / file, metrics, members, shown)
        after = "each from the model that the one before has left" if any(b.follows for b in members) else "each alone"
        sections += [
            f"## {series}: {len(names)} requests",
            f"At the end of unlearning, medians over the seeds; {after}.",
            f"![Over the requests]({file})",
            _table(metrics, names, shown),
        ]
    return sections


def _table(metrics: Mapping[str, Any], names: Sequence[str], shown: Mapping[str, Column]) -> str:
    """A line for each method and number."""
    start = metrics["start"][names[0]]
    runs = {name: histories_of(metrics, name) for name in names}
    rows: list[list[Any]] = [
        [METHODS[method].label, column.heading, start[key], *(at_end(runs[name][method], key) for name in names)]
        for method in runs[names[0]]
        for key, column in shown.items()
    ]
    return tables.markdown(["method", "", BEFORE, *names], rows, text=2)


def _figure(path: Path, metrics: Mapping[str, Any], members: Sequence[Benchmark], shown: Mapping[str, Column]) -> None:
    """A panel for each number: medians over the seeds, their range as a band; dotted: the retrained models."""
    names = [b.scenario for b in members]
    runs = {name: histories_of(metrics, name) for name in names}
    start, ticks = metrics["start"][names[0]], range(len(names) + 1)
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    title = f"{members[0].title}: after each request"
    with drawn(path, title, down, across, (4.8 * across + 0.2, 3.7 * down + 0.4)) as axes:
        for axis, (key, column) in zip(axes.flat, shown.items(), strict=False):
            for method in runs[names[0]]:
                ends = [over_seeds(runs[name][method], key)[:, -1] for name in names]  # one a seed
                middle, least, most = ([start[key], *map(f, ends)] for f in (np.median, np.min, np.max))
                axis.plot(ticks, middle, marker="o", markersize=4, **style(method))
                axis.fill_between(ticks, least, most, color=style(method)["color"], alpha=0.12, linewidth=0)
            retrained = [metrics["retrained"].get(name, {}).get(key) for name in names]
            if None not in retrained:
                axis.plot(ticks[1:], retrained, color=INK, linestyle=":", linewidth=1)
            axis.set_title(column.panel or "", loc="left", fontsize=11)
            axis.set_xticks(ticks, [BEFORE, *names])
            if not column.p_value:
                axis.set_ylim(-0.03, 1.03)
        for axis in list(axes.flat)[len(shown) :]:
            axis.set_visible(False)
        axes.flat[0].legend(frameon=False)
