"""The SimNPO paper's Markov chains: NPO and SimNPO forget short sequences, and a part that was never learned.

    python -m training.markov --lengths 2,5,10,20 --seeds 3 --json

Trains a small GPT-2 on three chains, retrains it on the retain chain alone, unlearns the other two, and measures how
far each chain is forgotten during training, for several lengths of the second forget chain. Writes metrics.json,
config.json, report.md and figures to --out. --json prints {length: {method: {"spent_forget2", "best_distance", ...}}},
means over the seeds in nats, as the last and only line on stdout.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import scipy
import torch
import transformers
from rich.table import Table

import npo_kernels
from training.commands.options import command_line
from training.commands.paper_run import carry_out
from training.commands.run_folder import RunFolder
from training.papers.simnpo_markov import experiment, figures, report
from training.papers.simnpo_markov.experiment import SWEEP, case_runs, draw_batches, measure, unlearn
from training.papers.simnpo_markov.setting import LENGTH, TRAIN_STEPS, Case, make_settings
from training.progress import counted, progress
from training.reports import tables
from training.store import write_text
from training.versions import versions

PROG = "training.markov"
FEWEST_STEPS = 20  # of training
SWEPT = Case(experiment.PUBLISHED_LENGTHS[0])
Outcomes = dict[str, list[dict[str, float]]]  # {run: of each seed}


@dataclass(frozen=True)
class MarkovOptions:
    """The experiment."""

    lengths: Annotated[str, "lengths of the forget2 sequences, separated by commas; the paper has 5 and 20"] = (
        "2,5,10,20"
    )
    unseen: Annotated[bool, "also run with a reference that has not learned forget2, of length 20"] = True
    sweep: Annotated[bool, "also run other learning rates and beta, if --lengths has 5"] = True
    seeds: Annotated[int, "number of seeds: 1000, 2000, ..."] = 3
    steps: Annotated[int, "steps of unlearning"] = experiment.STEPS
    train_steps: Annotated[int, "training steps of the reference and of the retrained model"] = TRAIN_STEPS
    out: Annotated[Path, "folder for the results"] = Path("runs/simnpo_markov")
    fresh: Annotated[bool, "remove the results of another experiment from --out"] = False
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    dry_run: Annotated[bool, "print what would be run, and stop"] = False


def main(options: MarkovOptions) -> dict[str, Any] | None:
    """What metrics.json holds; None after --dry_run."""
    lengths_of(options)
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.train_steps < FEWEST_STEPS:
        raise ValueError(
            f"--train_steps: expected at least {FEWEST_STEPS}, of which a tenth warms up, got {options.train_steps}"
        )
    return carry_out(
        options,
        options.out,
        used(),
        lambda folder: _run(options, folder),
        lambda metrics: result_table(metrics, options),
    )


def lengths_of(options: MarkovOptions) -> list[int]:
    """Ascending; ValueError where the option is no list of lengths."""
    words = [word.strip() for word in options.lengths.split(",")]
    if not all(word.isdecimal() and 2 <= int(word) <= LENGTH for word in words):
        raise ValueError(f"--lengths: expected numbers from 2 to {LENGTH} with commas, got {options.lengths!r}")
    return sorted({int(word) for word in words})


def _run(options: MarkovOptions, folder: RunFolder) -> dict[str, Any]:
    cases = [Case(length) for length in lengths_of(options)] + ([Case(LENGTH, seen=False)] if options.unseen else [])
    sweep = SWEEP if options.sweep and SWEPT in cases else {}
    paths: dict[str, dict[str, list[experiment.Path]]] = {case.name: {} for case in cases}
    outcomes: dict[str, Outcomes] = {case.name: {} for case in cases}
    swept: Outcomes = {}
    models: dict[str, Outcomes] = {case.name: {} for case in cases}
    aims = []
    with progress() as display:
        model = counted(display, "Training", options.seeds * (1 + len(cases)), "models")
        num_runs = sum(len(case_runs(case)) for case in cases) + len(sweep)
        step = counted(display, "Unlearning", options.seeds * num_runs, "runs")
        for seed in seeds_of(options):
            settings = make_settings(seed, cases, options.train_steps, lambda: model(1))
            for case, setting in settings.items():
                retrained = measure(setting, setting.retrained)
                aim = (retrained["forget1_quality"] + retrained["forget2_quality"]) / 2
                aims.append(aim)
                models[case.name].setdefault("reference", []).append(measure(setting, setting.reference))
                models[case.name].setdefault("retrained", []).append(retrained)
                drawn = draw_batches(setting, options.steps, seed)
                for name, run in case_runs(case).items():
                    path = unlearn(setting, run, drawn)
                    paths[case.name].setdefault(name, []).append(path)
                    outcomes[case.name].setdefault(name, []).append(path.outcome(aim))
                    step(1)
                for name, run in sweep.items() if case == SWEPT else ():
                    swept.setdefault(name, []).append(unlearn(setting, run, drawn).outcome(aim))
                    step(1)
    metrics: dict[str, Any] = {
        "methods": {case: _means(found) for case, found in outcomes.items()},
        "sweep_means": _means(swept),
        "models": {"aim": float(np.mean(aims)), "cases": {case: _means(found) for case, found in models.items()}},
        "per_seed": {case: _columns(found) for case, found in outcomes.items()},
        "sweep": _columns(swept),
        "paths": {
            case: {name: experiment.median_path(runs) for name, runs in found.items()} for case, found in paths.items()
        },
    }
    for case, methods in metrics["methods"].items():
        for name, found in methods.items():
            if not all(map(math.isfinite, found.values())):
                raise ValueError(f"{name} ended in numbers that are not finite, with forget2 of {case}; lower --steps")
    write_results(options, folder, metrics)
    return metrics


def write_results(options: MarkovOptions, folder: RunFolder, metrics: dict[str, Any]) -> None:
    out = folder.path
    title = f"Forget quality over retain distance, step by step: medians of {options.seeds} seeds"
    figures.plot_paths(metrics, title, out / "figure.png")
    title = f"What the length of the sequences to forget does: {options.seeds} seeds"
    figures.plot_lengths(metrics, lengths_of(options), title, out / "lengths.png")
    flags = "".join(f" --no_{name}" for name in ("unseen", "sweep") if not getattr(options, name))
    record = {
        "command": f"python -m {PROG} --lengths {options.lengths} --seeds {options.seeds} --steps {options.steps} "
        f"--train_steps {options.train_steps}{flags} --json",
        "seeds": seeds_of(options),
        "versions": used(),
    }
    write_text(out / "report.md", report.markdown(metrics, {"settings": folder.settings, **record}))
    folder.finish(metrics, **record)


def result_table(metrics: dict[str, Any], options: MarkovOptions) -> Table:
    keys = ("spent_forget1", "spent_forget2", "aim_retain", "best_distance")
    rows = [
        [f"{case}: {method}", *(f"{found[key]:.4f}" for key in keys)]
        for case, methods in metrics["methods"].items()
        for method, found in methods.items()
    ]
    headings = ["forget2: method", "forget1", "forget2", "retain, done", "least distance"]
    title = f"forget quality at one retain distance, nats, means of {options.seeds} seeds"
    return tables.terminal(headings, rows, title=title, caption=report.verdict(metrics))


def seeds_of(options: MarkovOptions) -> list[int]:
    return [1000 * (i + 1) for i in range(options.seeds)]


def used() -> dict[str, str]:
    return versions(npo_kernels, torch, transformers, np, scipy, matplotlib)


def _columns(found: Outcomes) -> dict[str, dict[str, list[float]]]:
    return {run: {key: [entry[key] for entry in entries] for key in entries[0]} for run, entries in found.items()}


def _means(found: Outcomes) -> dict[str, dict[str, float]]:
    return {
        run: {key: float(np.mean(values)) for key, values in columns.items()}
        for run, columns in _columns(found).items()
    }


if __name__ == "__main__":
    command_line(PROG, MarkovOptions, __doc__, main)
