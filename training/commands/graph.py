"""Influence-aware NPO on graphs: GA, NPO and INPO forget nodes of a synthetic citation graph.

    python -m training.graph --seeds 3 --json

Trains a graph convolutional network, retrains it without the forget nodes, unlearns these with every method from the
same reference, with and without a retain term, and writes metrics.json, config.json, report.md and a figure to --out.
--json prints {method: {"aim_forget_kl", "aim_test_kl", "end_test_accuracy", ...}}, medians over the seeds, as the last
and only line on stdout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
from rich.table import Table

import npo_kernels
from training.commands.options import command_line
from training.commands.paper_run import carry_out
from training.commands.run_folder import RunFolder
from training.papers.inpo_graph import figures, report
from training.papers.inpo_graph.experiment import (
    BETA,
    EVAL_EVERY,
    LR,
    METHODS,
    STEPS,
    Curve,
    Forgetting,
    curves,
    make_settings,
    measure,
)
from training.papers.inpo_graph.setting import Setting
from training.progress import counted, progress
from training.reports import tables
from training.store import write_text
from training.versions import versions

PROG = "training.graph"
FEWEST_NODES = 100  # six of them to forget


@dataclass(frozen=True)
class GraphOptions:
    """The experiment."""

    seeds: Annotated[int, "number of seeds: 1000, 2000, ..."] = 3
    nodes: Annotated[int, "nodes of the graph; Cora has 2708"] = 2700
    steps: Annotated[int, "steps of unlearning"] = STEPS
    beta: Annotated[float, "inverse temperature of NPO and INPO"] = BETA
    lr: Annotated[float, "learning rate of unlearning"] = LR
    out: Annotated[Path, "folder for the results"] = Path("runs/graph_inpo")
    fresh: Annotated[bool, "remove the results of another experiment from --out"] = False
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    dry_run: Annotated[bool, "print what would be run, and stop"] = False


def main(options: GraphOptions) -> dict[str, Any] | None:
    """What metrics.json holds; None after --dry_run."""
    if options.seeds < 1 or options.nodes < FEWEST_NODES:
        raise ValueError(
            f"expected at least one seed and {FEWEST_NODES} nodes, got {options.seeds} and {options.nodes}"
        )
    if options.steps < 1 or options.steps % EVAL_EVERY:
        raise ValueError(
            f"--steps: expected a multiple of {EVAL_EVERY}, the steps between two measurements, got {options.steps}"
        )
    for name in ("beta", "lr"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name}: expected more than 0, got {getattr(options, name)}")
    return carry_out(
        options,
        options.out,
        used(),
        lambda folder: _run(options, folder),
        lambda metrics: result_table(metrics, options),
    )


def _run(options: GraphOptions, folder: RunFolder) -> dict[str, Any]:
    with progress() as display:
        seed, run = (
            counted(display, "Training", options.seeds, "seeds"),
            counted(display, "Unlearning", options.seeds * len(METHODS), "runs"),
        )
        settings = make_settings(options.seeds, options.nodes, lambda: seed(1))
        constants = [Forgetting.of(setting) for setting in settings]
        found = curves(settings, constants, options.beta, options.lr, options.steps, lambda: run(1))
    metrics: dict[str, Any] = {
        "before": _medians([measure(setting, setting.reference) for setting in settings]),
        "retrained": _medians([measure(setting, setting.retrained) for setting in settings]),
        "influence": _medians([_spread(*pair) for pair in zip(settings, constants, strict=True)]),
        "methods": {name: curve.summary() for name, curve in found.items()},
        "per_seed": {
            name: {f"aim_{key}": values.tolist() for key, values in curve.at_aim().items()}
            for name, curve in found.items()
        },
    }
    diverged = [name for name, summary in metrics["methods"].items() if not all(map(math.isfinite, summary.values()))]
    if diverged:
        raise ValueError(f"{', '.join(diverged)} ended in numbers that are not finite; lower --lr")
    write_results(options, folder, metrics, found)
    return metrics


def write_results(options: GraphOptions, folder: RunFolder, metrics: dict[str, Any], found: dict[str, Curve]) -> None:
    title = f"Unlearning nodes of a graph: medians and range of {options.seeds} seeds"
    figures.plot_methods(found, title, folder.path / "figure.png")
    record = {
        "command": f"python -m {PROG} --seeds {options.seeds} --nodes {options.nodes} --steps {options.steps} "
        f"--beta {options.beta:g} --lr {options.lr:g} --json",
        "seeds": [1000 * (i + 1) for i in range(options.seeds)],
        "eval_every": EVAL_EVERY,
        "versions": used(),
    }
    write_text(folder.path / "report.md", report.markdown(metrics, {"settings": folder.settings, **record}))
    folder.finish(metrics, **record)


def result_table(metrics: dict[str, Any], options: GraphOptions) -> Table:
    headings = ["method", "forget", "test", "test acc.", "test, end", "test acc., end"]
    keys = ("aim_forget_kl", "aim_test_kl", "aim_test_accuracy", "end_test_kl", "end_test_accuracy")
    rows = [[name, *(f"{found[key]:.4f}" for key in keys)] for name, found in metrics["methods"].items()]
    title = f"distance from the retrained model, nats, medians of {options.seeds} seeds"
    return tables.terminal(headings, rows, title=title, caption=f"{report.verdict(metrics, '+RT')}")


def used() -> dict[str, str]:
    return versions(npo_kernels, torch, np, matplotlib)


def _medians(entries: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.median([entry[key] for entry in entries])) for key in entries[0]}


def _spread(setting: Setting, constants: Forgetting) -> dict[str, float]:
    """Spread of the weights of one seed, and how much of it the number of neighbours explains."""
    weights = np.sort(constants.weights["inpo"].numpy())
    degrees = setting.graph.degrees[setting.forget].numpy()
    return {
        "least": float(weights[0]),
        "most": float(weights[-1]),
        "top_tenth": float(weights[-max(1, len(weights) // 10) :].sum() / weights.sum()),
        "degree_correlation": float(np.corrcoef(constants.weights["inpo"].numpy(), degrees)[0, 1]),
    }


if __name__ == "__main__":
    command_line(PROG, GraphOptions, __doc__, main)
