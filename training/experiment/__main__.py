"""Forget sets x methods x seeds of TOFU unlearning, with one table, figures and a verdict at the end.

    python -m training.experiment --data_dir path/to/tofu --forget_percents 5 --seeds 0,1,2 --out runs/experiment
    python -m training.experiment --preset llama-3.2-1b --forget_percents 1,5,10 --seeds 0,1,2,3,4

Fine-tunes one model on all rows, and for every forget set one on the rows to keep, whose answers are what forgetting is
measured against. Then every method unlearns with every seed, evaluated on the way. All runs are resumed where they were
interrupted, and what is finished is not run again. --out gets report.md, metrics.json, config.json, two figures for
each forget set, and the folders of the runs.
"""

from dataclasses import asdict
from typing import Any

from training import processes
from training.command import NO_PATHS, command_line, device_name, model_name
from training.experiment.figures import plot_over_epochs, plot_trade_off
from training.experiment.grid import ExperimentOptions, Grid
from training.experiment.report import markdown
from training.model import pick_device
from training.stages import write_json, write_text
from training.versions import versions

PROG = "training.experiment"


def main(options: ExperimentOptions) -> dict[str, Any] | None:
    """metrics.json; None after --dry_run."""
    grid = Grid(options)
    if options.dry_run:
        print("\n".join(grid.plan()))
        return None
    metrics = grid.run()
    config = {
        "settings": {k: v for k, v in asdict(grid.options).items() if k not in NO_PATHS}
        | {"model": model_name(options.model) if options.model else None},
        "device": device_name(pick_device(options.device)),
        "versions": versions(),
    }

    def write() -> None:
        write_json(options.out / "metrics.json", metrics)
        write_json(options.out / "config.json", config)
        for percent in grid.percents:
            plot_trade_off(metrics, percent, options.out / f"trade_off_forget{percent:02d}.png")
            plot_over_epochs(metrics, percent, options.out / f"epochs_forget{percent:02d}.png")
        write_text(options.out / "report.md", markdown(metrics, config, grid.percents))

    processes.on_main(write)
    return metrics


if __name__ == "__main__":
    command_line(PROG, ExperimentOptions, __doc__, main)
