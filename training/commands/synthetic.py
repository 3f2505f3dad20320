"""The NPO paper's logistic experiment, with all methods, and its theorem on the rate of collapse.

    python -m training.synthetic --alpha 1 --seeds 5 --json

Unlearns with every method from the same reference, measures forget and retain distance during training, and writes
metrics.json, config.json, report.md and figures to --out. For alpha 1 also the sweep over beta (NPO tends to gradient
ascent as beta -> 0). --json prints {method: {"end_fd", "end_rd", "min_fd", ...}}, medians over the seeds in nats, as
the last and only line on stdout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib
import numpy as np
import scipy
import torch
from rich.table import Table

import npo_kernels
from training.commands.options import command_line
from training.commands.paper_run import carry_out
from training.commands.run_folder import RunFolder
from training.papers.npo_logistic import figures, report
from training.papers.npo_logistic.collapse import diverge
from training.papers.npo_logistic.experiment import (
    BETA_STEPS,
    EVAL_EVERY,
    STEPS,
    beta_runs,
    curves,
    make_settings,
    method_runs,
)
from training.progress import counted, progress
from training.reports import tables
from training.store import write_text
from training.versions import versions

PROG = "training.synthetic"


@dataclass(frozen=True)
class SyntheticOptions:
    """The experiment."""

    alpha: Annotated[Literal[1, 0], "distance of the clouds: 1 far apart, 0 the same cloud"] = 1
    seeds: Annotated[int, "number of seeds: 1000, 2000, ..."] = 5
    steps: Annotated[int, "gradient steps of unlearning"] = STEPS
    beta_steps: Annotated[int, "gradient steps of the sweep over beta (alpha 1 only); 0: no sweep"] = BETA_STEPS
    collapse: Annotated[bool, "measure the rate of collapse as well"] = True
    out: Annotated[Path | None, "folder for the results. None: runs/synthetic_alpha{alpha}"] = None
    fresh: Annotated[bool, "remove the results of another experiment from --out"] = False
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    dry_run: Annotated[bool, "print what would be run, and stop"] = False


def main(options: SyntheticOptions) -> dict[str, Any] | None:
    """What metrics.json holds; None after --dry_run."""
    if options.seeds < 1 or options.steps < 1:
        raise ValueError(f"expected at least one seed and one step, got {options.seeds} and {options.steps}")
    if options.steps % EVAL_EVERY or options.beta_steps % EVAL_EVERY:
        raise ValueError(
            f"--steps, --beta_steps: expected multiples of {EVAL_EVERY}, the steps between two measurements, got "
            f"{options.steps} and {options.beta_steps}"
        )
    out = options.out or Path(f"runs/synthetic_alpha{options.alpha}")
    return carry_out(
        options,
        out,
        used(),
        lambda folder: _run(options, folder),
        lambda metrics: result_table(metrics["methods"], options),
    )


def _run(options: SyntheticOptions, folder: RunFolder) -> dict[str, Any]:
    sweep = options.alpha == 1 and options.beta_steps > 0
    with progress() as display:

        def advance(description: str):
            on_seeds = counted(display, description, options.seeds, "seeds")
            return lambda: on_seeds(1)

        settings = make_settings(options.alpha, options.seeds, advance("Pre-training"))
        methods = curves(settings, method_runs(options.alpha), options.steps, advance("Unlearning"))
        betas = curves(settings, beta_runs(), options.beta_steps, advance("Sweep over beta")) if sweep else {}
    divergences = diverge() if options.collapse else []

    before = next(iter(methods.values()))
    metrics: dict[str, Any] = {
        "before": {"fd": float(np.median(before.forget[:, 0])), "rd": float(np.median(before.retain[:, 0]))},
        "methods": {name: curve.summary() for name, curve in methods.items()},
        "beta": {name: curve.summary() for name, curve in betas.items()},
        "collapse": {
            "GA" if d.beta is None else f"NPO, beta {d.beta:g}": {"measured": d.measured, "theory": d.theory}
            for d in divergences
        },
        "per_seed": {
            name: {"end_fd": curve.forget[:, -1].tolist(), "end_rd": curve.retain[:, -1].tolist()}
            for name, curve in methods.items()
        },
    }
    write_results(options, folder, metrics, methods, betas, divergences)
    return metrics


def write_results(options: SyntheticOptions, folder: RunFolder, metrics, methods, betas, divergences) -> None:
    out = folder.path
    title = f"Logistic experiment, alpha = {options.alpha}: medians and quartiles of {options.seeds} seeds"
    figures.plot_methods(methods, title, out / "figure.png")
    if betas:
        figures.plot_beta(betas, "NPO tends to gradient ascent as beta tends to 0", out / "beta.png")
    if divergences:
        figures.plot_collapse(divergences, "Rate of collapse: linear and logarithmic", out / "collapse.png")
    config = {
        "command": f"python -m {PROG} --alpha {options.alpha} --seeds {options.seeds} --json",
        "alpha": options.alpha,
        "seeds": [1000 * (i + 1) for i in range(options.seeds)],
        "steps": options.steps,
        "beta_steps": options.beta_steps if betas else 0,
        "runs": {name: {"lr": run.lr, "beta": run.beta} for name, run in method_runs(options.alpha).items()},
        "versions": used(),
    }
    write_text(out / "report.md", report.markdown(metrics, config))
    folder.finish(metrics, **config)


def result_table(summaries: report.Summaries, options: SyntheticOptions) -> Table:
    headings = ["method", "forget, end", "retain, end", "forget, least"]
    rows = [
        [name, *(f"{found[key]:.4f}" for key in ("end_fd", "end_rd", "min_fd"))] for name, found in summaries.items()
    ]
    return tables.terminal(headings, rows, title=f"alpha {options.alpha}, medians of {options.seeds} seeds, nats")


def used() -> dict[str, str]:
    return versions(npo_kernels, torch, np, scipy, matplotlib)


if __name__ == "__main__":
    command_line(PROG, SyntheticOptions, __doc__, main)
