"""Write report.html of a grid from its metrics.json and config.json: a single file that loads nothing.

    python -m training.page --results training/results/methods_cpu

`training.grid` writes the same page at its end; this command is for existing results.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from training.benchmarks import Benchmark
from training.commands.grid import command_of, scenarios
from training.commands.options import benchmark_named, command_line
from training.methods import METHODS
from training.reports.page import write_page

PROG = "training.page"


@dataclass(frozen=True)
class PageOptions:
    """The page."""

    results: Annotated[Path, "folder of a finished grid"] = Path("runs/grid")


def main(options: PageOptions, console: Console | None = None) -> Path:
    """Where the page is."""
    metrics, config = (_read(options.results / name) for name in ("metrics.json", "config.json"))
    settings = config.get("settings", {})
    runs = metrics.get("runs")
    if not (isinstance(runs, list) and runs and all("scenario" in run for run in runs) and "benchmark" in settings):
        raise ValueError(
            f"--results {options.results}: expected metrics.json and config.json of training.grid, with a benchmark "
            "and runs that have a scenario; got others. Run the grid again"
        )
    unknown = {run["method"] for run in runs} - METHODS.keys()
    if unknown:
        raise ValueError(
            f"--results {options.results}: expected methods of the registry, got {', '.join(sorted(unknown))}; a file "
            "of training/methods has to register them"
        )
    benchmarks = _benchmarks(settings)
    wanted, found = {run["scenario"] for run in runs}, {benchmark.scenario for benchmark in benchmarks}
    if wanted != found:
        raise ValueError(
            f"--results {options.results}: config.json is of {', '.join(sorted(found))}, metrics.json of "
            f"{', '.join(sorted(wanted))}; expected both of one grid"
        )
    path = options.results / "report.html"
    write_page(path, metrics, {"command": command_of(settings), **config}, benchmarks)
    (console or Console()).print(f"{path}: {path.stat().st_size / 1000:.0f} kB", highlight=False, soft_wrap=True)
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--results {path.parent}: expected {path.name} of training.grid in it: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--results {path.parent}: expected an object in {path.name}, got {type(content).__name__}")
    return content


def _benchmarks(settings: dict[str, Any]) -> list[Benchmark]:
    """One for each forget set, with the options that the grid was run with."""
    kind = benchmark_named(settings["benchmark"])
    names = {field.name for field in fields(kind.Options)}
    options = kind.Options(**{name: value for name, value in settings.items() if name in names})
    return scenarios(kind(options), settings.get("forget_percents"), settings.get("forget_sets"))


if __name__ == "__main__":
    command_line(PROG, PageOptions, __doc__, main)
