"""Unlearn fictitious authors with NPO + retain, next to gradient ascent: one command, from data to figure.

    python -m training.demo                              generated authors
    python -m training.demo --data_dir path/to/tofu      TOFU's JSON lines
    accelerate launch --config_file training/launch/ddp.yaml -m training.demo      the same by two processes

Fine-tunes a small Llama on all authors, caches its log-probabilities of the authors to forget, unlearns these by each
method, and writes metrics.json, report.md, figure.png and config.json to --out. A second run with the same settings
re-uses the finished stages.
"""

import time

from rich.console import Console

from training import processes
from training.command import device_name
from training.config import Config, from_command_line, public
from training.pipeline import Run
from training.plots import plot_run
from training.report import markdown, result_table, what_to_see
from training.stages import write_json, write_text
from training.versions import versions


def main(config: Config, console: Console) -> dict:
    """Run all stages, write the results, return the metrics."""
    started, out = time.perf_counter(), config.out
    run = Run(config, console)
    data = run.data_summary()
    console.rule(f"{data['name']}: {data['forget_authors']} of {data['authors']} authors to forget, on {run.device}")
    metrics = run.execute()
    processes.on_main(lambda: write_results(run, metrics))

    console.print(result_table(metrics["history"]))
    console.print(what_to_see(metrics["history"]), soft_wrap=False)
    console.print(f"\n{time.perf_counter() - started:.0f} s. Results in {out}: report.md, figure.png, metrics.json")
    return metrics


def write_results(run: Run, metrics: dict) -> None:
    config, data = run.config, metrics["data"]
    settings = {"settings": public(config), "device": device_name(run.device), "versions": versions()}
    write_json(config.out / "metrics.json", metrics)
    write_json(config.out / "config.json", settings)
    write_text(config.out / "report.md", markdown(metrics, settings, run.seconds))
    title = f"Unlearning {data['forget_authors']} of {data['authors']} authors ({data['name']})"
    plot_run(metrics["history"], title, config.out / "figure.png")


if __name__ == "__main__":
    config = from_command_line(None, __doc__)
    processes.start(config.device)
    main(config, Console(quiet=not processes.is_main()))
