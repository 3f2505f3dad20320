"""Compute the metrics of a benchmark, for a model or from an existing evaluation log.

    python -m training.evaluate --from_log LOG [--retain_log LOG] --json
    python -m training.evaluate --model DIR --data_dir path/to/tofu --forget_percent 10 [--retain_log LOG]

The first command reads a log; for TOFU that is eval_log_aggregated.json in either of the published layouts. The second
evaluates a model folder, for TOFU on its four sets: answer probabilities, perturbed answers for the truth ratio, greedy
answers for ROUGE. It writes the log to --out, next to metrics.json, config.json and report.md. Each row needs a forward
pass for each of its answers, three more, and a generation. --retain_log is the log of a model trained without the
forget set; without it there is no forget quality. --format open_unlearning also writes the files of OpenUnlearning's
evaluations. --json prints one JSON object on stdout and nothing else; for TOFU: model_utility_geometric,
model_utility_arithmetic (named after the mean in the truth ratio), forget_quality, and prob, rougeL and tr of the sets
retain, ra, wf and forget, such as retain_prob.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

from training import distributed
from training.benchmarks import BENCHMARKS, Benchmark
from training.commands.options import command_line
from training.commands.run_folder import RunFolder, public
from training.commands.told import tell_warnings
from training.config import Precision, Rounding
from training.reports import tables
from training.store import fingerprint, write_json, write_text

PROG = "training.evaluate"
LOG_FILE = "eval_log_aggregated.json"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and where the results go."""

    from_log: Annotated[Path | None, "evaluation log to read instead of running a model"] = None
    retain_log: Annotated[
        Path | None, "evaluation log of a model trained without the forget set; needed for the forget quality"
    ] = None
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    model: Annotated[Path | None, "folder of the model to evaluate, tokenizer included"] = None
    benchmark: Annotated[str, lambda: f"benchmark whose metrics are computed: {', '.join(BENCHMARKS)}"] = "tofu"
    template: Annotated[
        str, "prompt template (training/templates.py); auto: chosen by the tokenizer's chat template"
    ] = "auto"
    precision: Annotated[Precision, "of the arithmetic; auto: bf16 on a GPU that supports it, fp32 elsewhere"] = "auto"
    rounded: Annotated[Rounding, "evaluate --model with its weights rounded to this (training/quantization.py)"] = "off"
    out: Annotated[Path, "folder for the log, the metrics and the report"] = Path("runs/evaluate")
    format: Annotated[
        Literal["ours", "open_unlearning"], "open_unlearning: write --out/NAME_EVAL.json and NAME_SUMMARY.json as well"
    ] = "ours"
    fresh: Annotated[bool, "remove the results of another evaluation from --out"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    dry_run: Annotated[bool, "print what would be run, and stop"] = False


def main(options: EvaluateOptions, benchmark: Benchmark) -> dict[str, Any] | None:
    """The metrics; None after --dry_run. Input that does not fit raises ValueError or FileNotFoundError."""
    if (options.from_log is None) == (options.model is None):
        raise ValueError(
            f"expected either --from_log LOG or --model DIR, got {'both' if options.model else 'neither'}; see --help"
        )
    if options.from_log and options.rounded != "off":
        raise ValueError("--rounded: expected --model, whose weights are rounded; a log has none")
    if options.format == "open_unlearning" and type(benchmark).open_unlearning is Benchmark.open_unlearning:
        benchmark.open_unlearning(None, {})  # says that there is no such format
    retrained = benchmark.read(options.retain_log) if options.retain_log else None
    folder: RunFolder | None = None
    measures = None
    if options.from_log:
        measures = benchmark.read(options.from_log)
    elif options.dry_run:
        print(json.dumps(public(options, benchmark.options) | {"evaluated": benchmark.size()}, indent=2, default=str))
        return None
    else:
        folder = RunFolder(options.out, options, benchmark.options)
    with nullcontext() if folder is None else folder.alone():
        found = False
        if folder:
            measures, found = _evaluated(options, benchmark, folder)
        tell_warnings(benchmark, measures, retrained)
        result = benchmark.summarize(measures, retrained)
        if folder and not found:
            _write_report(folder, benchmark, result)
        if options.format == "open_unlearning":
            for name, content in benchmark.open_unlearning(measures, result).items():
                distributed.on_main(partial(write_json, options.out / name, content))
    if folder is None or distributed.is_main():
        _print(options, benchmark, result)
    return result


def _evaluated(options: EvaluateOptions, benchmark: Benchmark, folder: RunFolder) -> tuple[Any, bool]:
    """(the measures of a model, which --out then has; whether they were found there, made by this very command)."""
    # a log is read without all of this
    from training.commands.session import measured, model_fingerprint
    from training.loading import load_tokenizer
    from training.model import load_model, pick_device
    from training.progress import progress
    from training.quantization import quantize_
    from training.templates import Format

    model, device = options.model, pick_device(options.device)
    if model is None or not (model / "config.json").is_file():
        raise ValueError(
            f"expected a model folder with config.json, got --model {model}; save the model with save_pretrained, "
            "tokenizer included"
        )
    format = Format(load_tokenizer(model), options.template)
    log = options.out / LOG_FILE
    retain_log = options.retain_log and options.retain_log.read_text(encoding="utf-8")
    depends_on = [
        benchmark.key(),
        model_fingerprint(str(model)),
        format.hash(),
        options.precision,
        options.rounded,
        device.type,
        retain_log,
    ]
    if folder.begin(fingerprint(depends_on), options.fresh) is not None:
        return benchmark.read(log), True
    with progress() as display:
        loaded = load_model(model, device, precision=options.precision)
        if options.rounded != "off":
            quantize_(loaded, options.rounded)
        return measured(benchmark, loaded, format, log, display, name=str(log)), False


def _write_report(folder: RunFolder, benchmark: Benchmark, result: dict[str, Any]) -> None:
    model = folder.settings["model"]
    table = tables.markdown(*benchmark.table(result))
    sections = [f"# Evaluation of {model}", benchmark.headline(result), table, benchmark.legend]
    text = "\n\n".join(section for section in sections if section) + "\n"
    distributed.on_main(lambda: write_text(folder.path / "report.md", text))
    folder.results = (LOG_FILE,)
    folder.finish(result)


def _print(options: EvaluateOptions, benchmark: Benchmark, result: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(result))
    else:
        console = Console(highlight=False, markup=False)
        console.print(benchmark.headline(result))
        console.print(tables.terminal(*benchmark.table(result)), width=max(console.width, 110))  # or numbers are cut
        console.print(benchmark.legend, style="dim")


if __name__ == "__main__":
    command_line(PROG, EvaluateOptions, __doc__, main)
