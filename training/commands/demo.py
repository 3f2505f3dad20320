"""Unlearn fictitious authors with NPO + retain, next to gradient ascent: one command, from data to figure.

    python -m training.demo                              generated authors
    python -m training.demo --data_dir path/to/tofu      TOFU's JSON lines
    accelerate launch --config_file training/launch/ddp.yaml -m training.demo      the same with two processes

A preset of `training.grid`: a small Llama learns all authors, unlearns some of them with each method, and is evaluated
on both the forgotten and the kept authors. --out gets report.md, the figure epochs_forget10.png, metrics.json and
config.json. A second run with the same settings reuses the finished stages.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from training import distributed
from training.benchmarks.authors import AuthorsOptions
from training.commands import grid
from training.commands.options import build, command_line
from training.histories import Histories, histories_of
from training.methods import METHODS
from training.reports import tables
from training.reports.grid import what_to_see

PROG = "training.demo"
# Generated authors are similar to each other: forgetting some hurts the others unless the retain weight is larger.
GENERATED = {"authors": 60, "finetune_epochs": 10, "lr": 6e-4, "retain_weight": 5.0}
TOFU = {"authors": 40, "finetune_epochs": 8, "lr": 3e-4, "retain_weight": 1.0}


@dataclass(frozen=True)
class DemoOptions(AuthorsOptions):
    """The demo. With the defaults it takes a few minutes on two CPU cores (training/results/demo_cpu)."""

    out: Annotated[Path, "folder of the demo"] = Path("runs/demo")
    fresh: Annotated[bool, "run every stage again, even if --out has its results"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    seed: Annotated[int, "seed of the authors, the weights, the batches and the retain rows"] = 0
    methods: Annotated[str, "methods to compare"] = "npo_rt,ga"
    hidden_size: Annotated[int, "width of the model, a multiple of 64"] = 512
    layers: Annotated[int, "decoder layers"] = 1
    authors: Annotated[
        int | None, "number of authors, 20 pairs each; 0: all of --data_dir. None: 60, or 40 of TOFU"
    ] = None  # type: ignore[assignment]
    data_seed: Annotated[int | None, "seed of the authors and of the sample. None: --seed"] = None  # type: ignore[assignment]
    finetune_epochs: Annotated[int | None, "fine-tuning epochs over all authors. None: 10, or 8 with TOFU"] = None
    finetune_lr: Annotated[float, "peak learning rate of fine-tuning"] = 2e-3
    batch_size: Annotated[int, "sequences per step; in unlearning: of the forget set"] = 16
    epochs: Annotated[int, "unlearning epochs over the forget set"] = 10
    lr: Annotated[float | None, "peak learning rate of unlearning. None: 6e-4, or 3e-4 with TOFU"] = None
    beta: Annotated[float, "inverse temperature of NPO; towards 0 it becomes gradient ascent"] = 0.1
    retain_weight: Annotated[float | None, "weight of the retain likelihood in NPO+RT. None: 5, or 1 with TOFU"] = None


def grid_options(options: DemoOptions) -> tuple[Any, ...]:
    """The options of the grid, and the authors, of which this is a preset."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    seeds = {"data_seed": options.seed if options.data_seed is None else options.data_seed, "seeds": str(options.seed)}
    defaults = GENERATED if options.data_dir is None else TOFU
    return build(grid.GridOptions, benchmark="authors", retrain=False, **{**defaults, **given, **seeds})


def main(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Run the grid, print a summary, return its metrics."""
    started, console = time.perf_counter(), console or Console(quiet=not distributed.is_main())
    chosen, benchmark = grid_options(options)
    metrics = grid.main(chosen, benchmark, console)
    assert metrics is not None  # it was no dry run
    name, start = benchmark.scenario, metrics["start"][benchmark.scenario]
    histories = histories_of(metrics, name)
    console.print(tables.terminal(*_by_epoch(histories), title="Answer probability"))
    console.print(what_to_see(start, histories))
    console.print(f"\n{time.perf_counter() - started:.0f} s. Results in {options.out}: report.md, epochs_{name}.png")
    return metrics


def _by_epoch(histories: Histories) -> tuple[list[str], list[list[Any]]]:
    keys = {"forget_prob": "forget", "retain_prob": "keep"}
    runs = {method: seeds[0] for method, seeds in histories.items()}
    headings = ["epoch", *(f"{METHODS[m].label}\n{heading}" for m in runs for heading in keys.values())]
    rows = [
        [f"{e[0]['epoch']:.0f}", *(f"{h[key]:.3f}" for h in e for key in keys)]
        for e in zip(*runs.values(), strict=True)
    ]
    return headings, rows


if __name__ == "__main__":
    command_line(PROG, DemoOptions, __doc__, main)
