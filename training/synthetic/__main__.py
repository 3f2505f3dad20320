"""The NPO paper's logistic experiment, with all methods, and its theorem on the rate of collapse.

    python -m training.synthetic --alpha 1 --seeds 5 --json

Unlearns with every method from the same reference, measures forget and retain distance on the way, and writes
metrics.json, config.json, report.md and figures to --out. For alpha 1 also the sweep over beta (NPO tends to gradient
ascent as beta -> 0). --json prints {method: {"end_fd", "end_rd", "min_fd", ...}}, medians over the seeds in nats, as
the last and only line on stdout.
"""

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib
import numpy as np
import scipy
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import npo_kernels
from training.options import parse, stop
from training.stages import write_json, write_text
from training.synthetic import figures, report
from training.synthetic.collapse import diverge
from training.synthetic.experiment import BETA_STEPS, STEPS, beta_runs, curves, make_settings, method_runs

PROG = "training.synthetic"


@dataclass(frozen=True)
class SyntheticOptions:
    alpha: Annotated[Literal[1, 0], "distance of the clouds: 1 far apart, 0 the same cloud"] = 1
    seeds: Annotated[int, "how many: 1000, 2000, ..."] = 5
    steps: Annotated[int, "gradient steps of unlearning"] = STEPS
    beta_steps: Annotated[int, "gradient steps of the sweep over beta, which is for alpha 1; 0: no sweep"] = BETA_STEPS
    collapse: Annotated[bool, "measure the rate of collapse as well"] = True
    out: Annotated[Path | None, "folder for the results (default: runs/synthetic_alpha{alpha})"] = None
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    dry_run: Annotated[bool, "say what would be run, and stop"] = False


def main(options: SyntheticOptions) -> dict[str, Any] | None:
    """What metrics.json holds; None after --dry_run."""
    if options.seeds < 1 or options.steps < 1:
        raise ValueError(f"expected at least one seed and one step, got {options.seeds} and {options.steps}")
    sweep = options.alpha == 1 and options.beta_steps > 0
    if options.dry_run:
        print(json.dumps(asdict(options), indent=2, default=str))
        return None
    with Progress(console=Console(stderr=True)) as progress:

        def advance(description: str):
            task = progress.add_task(description, total=options.seeds)
            return lambda: progress.advance(task)

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
    write_results(options, metrics, methods, betas, divergences)
    if options.json:
        print(json.dumps(metrics["methods"]))
    else:
        Console().print(result_table(metrics["methods"], options))
    return metrics


def write_results(options: SyntheticOptions, metrics, methods, betas, divergences) -> None:
    out = options.out or Path(f"runs/synthetic_alpha{options.alpha}")
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
        "versions": versions(),
    }
    write_json(out / "metrics.json", metrics)
    write_json(out / "config.json", config)
    write_text(out / "report.md", report.markdown(metrics, config))


def result_table(summaries: report.Summaries, options: SyntheticOptions) -> Table:
    table = Table(title=f"alpha {options.alpha}, medians of {options.seeds} seeds, nats")
    for heading in ("method", "forget, end", "retain, end", "forget, least"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, summary in summaries.items():
        table.add_row(name, *(f"{summary[key]:.4f}" for key in ("end_fd", "end_rd", "min_fd")))
    return table


def versions() -> dict[str, str]:
    modules = (npo_kernels, torch, np, scipy, matplotlib)
    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}


if __name__ == "__main__":
    chosen = parse(SyntheticOptions, PROG, __doc__)
    try:
        main(chosen)
    except (ValueError, RuntimeError) as reason:
        stop(PROG, reason)
