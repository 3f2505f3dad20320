"""report.md and figure.png of a single run."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.benchmarks.base import Benchmark, Column
from training.methods import METHODS
from training.reports import tables
from training.reports.figures import COLOURS, drawn, plot_run
from training.store import write_text

CAVEAT = (
    "Unlearning is no guarantee. The figures say what the model answers to the questions that were asked; what it was "
    "made to forget may come back by fine-tuning, quantisation or other questions (`python -m training.attack`). Do "
    "not rely on it to remove personal or dangerous knowledge."
)
ATTACKED = "After attacks"  # heading of the tables that have them
PROGRESS = {"step": Column("step"), "epoch": Column("epoch"), "train_loss": Column("loss")}


def write_unlearning_report(
    folder: Path, metrics: dict[str, Any], settings: dict[str, Any], benchmark: Benchmark
) -> None:
    scenario, label = metrics["scenario"], metrics["method"]
    colour = next(method.colour for method in METHODS.values() if method.label == label)
    plot_run(
        metrics["history"],
        benchmark.columns,
        f"{label}: {scenario}, {settings['model']}",
        folder / "figure.png",
        colour,
    )
    sections = [
        f"# Unlearning {scenario} by {label}",
        history_table(metrics["history"], benchmark.columns),
        benchmark.legend,
        "![Over the steps](figure.png)",
        *_after_attacks(metrics, benchmark.columns),
        "## What was run",
        f"- {metrics['steps']} steps; rows: " + ", ".join(f"{n} {kind}" for kind, n in metrics["rows"].items()) + ".\n"
        f"{_at_step_zero(metrics['step_zero'])}"
        f"- Settings: {tables.settings_line(settings)}.",
        "## Greedy answers, before and after",
        tables.samples(metrics["samples"]),
        CAVEAT,
    ]
    write_text(folder / "report.md", "\n\n".join(section for section in sections if section) + "\n")


def write_finetuning_report(folder: Path, metrics: dict[str, Any], settings: dict[str, Any]) -> None:
    """The loss over the epochs, in nats per answer token."""
    steps, losses = zip(*((h["step"], h["train_loss"]) for h in metrics["history"][1:]), strict=True)
    with drawn(folder / "figure.png") as axes:
        axes[0, 0].plot(steps, losses, color=COLOURS[1], marker="o", markersize=3.5)
        axes[0, 0].set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    sections = [
        f"# Fine-tuning {settings['model']} on {settings['split']}",
        history_table(metrics["history"][1:], {}),
        "![Loss](figure.png)",
        f"{metrics['rows']} rows, {metrics['steps']} steps. Settings: {tables.settings_line(settings)}.",
    ]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")


def history_table(history: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """One line per evaluation, with the columns that were measured."""
    shown = columns_of({**PROGRESS, **columns}, history)
    return tables.markdown(list(shown.values()), [[entry.get(key) for key in shown] for entry in history])


def _after_attacks(metrics: Mapping[str, Any], columns: Mapping[str, Column]) -> list[str]:
    """Heading and table of the numbers before unlearning, after it, and after attacks; nothing without these."""
    if not metrics.get("attacks"):
        return []
    stages = {"before": metrics["history"][0], "after": metrics["history"][-1]}
    stages |= {f"after, {attack}": summary for attack, summary in metrics["attacks"].items()}
    shown = columns_of(columns, stages.values())
    rows = [[name, *(summary.get(key) for key in shown)] for name, summary in stages.items()]
    return [f"## {ATTACKED}", tables.markdown(["model", *shown.values()], rows)]


def columns_of(columns: Mapping[str, Column], entries: Collection[Mapping[str, Any]]) -> dict[str, str]:
    """{key: heading} of the columns that some entry has."""
    return {key: c.heading for key, c in columns.items() if any(e.get(key) is not None for e in entries)}


def _at_step_zero(zero: dict[str, float] | None) -> str:
    if zero is None:
        return "- The method takes no reference model.\n"
    return (
        f"- Before the first step: NPO loss {zero['loss']:.6f}, (2/beta) ln 2 = {zero['expected_loss']:.6f}, largest "
        f"log-ratio to the cached reference {zero['max_abs_log_ratio']:.1e}.\n"
    )
