"""TOFU's metrics, of a published evaluation log or of a model.

    python -m training.evaluate --from_log LOG [--retain_log LOG] --json
    python -m training.evaluate --model DIR --data_dir path/to/tofu --forget_percent 10 [--retain_log LOG]

The first reads a log (eval_log_aggregated.json) in either of the published layouts. The second evaluates a model folder
on TOFU's four sets: answer probabilities, perturbed answers for the truth ratio, greedy answers for ROUGE; it writes
such a log to --out, next to metrics.json, config.json and report.md, and needs about (3 + answers) forward passes a row
and one generation. --retain_log is the log of a model trained without the forget set; without it there is no forget
quality. --json prints one JSON object on stdout and nothing else: model_utility_geometric, model_utility_arithmetic
(by the mean in the truth ratio), forget_quality, and {retain,ra,wf,forget}_{prob,rougeL,tr}.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from training.eval_log import EvalLog, Layout, read_log, warnings, write_log
from training.options import parse, stop
from training.require import require
from training.stages import write_json, write_text
from training.summary import summary

PROG = "training.evaluate"
LOG_FILE = "eval_log_aggregated.json"
MEASURES = {  # what a table shows, and as what
    "prob": "Prob",
    "rougeL": "ROUGE-L",
    "tr": "TR",
    "tr_arithmetic": "TR (a)",
    "exact_memorization": "EM",
    "extraction_strength": "ES",
    "repetition": "repeat",
    "compression_ratio": "zlib",
}
LEGEND = (
    "Prob: probability of the answer; TR: truth ratio, geometric and (a) arithmetic; EM: exact memorisation; "
    "ES: extraction strength; repeat: repeated 4-grams; zlib: compression ratio of the generations"
)
NAMES = {"retain": "retain", "ra": "real authors", "wf": "world facts", "forget": "forget"}


@dataclass(frozen=True)
class EvaluateOptions:
    from_log: Annotated[Path | None, "evaluation log to read; nothing is run"] = None
    retain_log: Annotated[Path | None, "log of the model that never saw the forget set, for the forget quality"] = None
    json: Annotated[bool, "print one JSON object on stdout, and nothing else"] = False
    model: Annotated[Path | None, "folder of the model to evaluate, tokenizer included"] = None
    data_dir: Annotated[str, "folder with TOFU's *_perturbed.json, or a data set of the hub"] = "locuslab/TOFU"
    forget_percent: Annotated[int, "which forget set: 1, 5, 10; larger ones are scored on forget10"] = 10
    template: Annotated[str, "of the prompts (training/templates.py); auto: by the tokenizer's chat template"] = "auto"
    rows: Annotated[int, "first rows of every set that are used; 0: all. Published logs have 300"] = 300
    out: Annotated[Path, "folder for the log, the metrics and the report"] = Path("runs/evaluate")
    layout: Annotated[Layout, "of the log: lists (NPO's) or indexed (TOFU's)"] = "lists"
    batch_size: Annotated[int, "sequences a forward pass or generation"] = 32
    max_new_tokens: Annotated[int, "longest greedy answer; TOFU allows 200 tokens with the prompt"] = 200
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    dry_run: Annotated[bool, "say what would be run, and stop"] = False


def main(options: EvaluateOptions) -> dict[str, Any] | None:
    """The metrics; None after --dry_run. Input that does not fit raises LogError, ValueError or FileNotFoundError."""
    if (options.from_log is None) == (options.model is None):
        raise ValueError(
            f"expected either --from_log LOG or --model DIR, got {'both' if options.model else 'neither'}; see --help"
        )
    retain_log = read_log(options.retain_log) if options.retain_log else None
    log = _evaluated(options, options.model) if options.model else read_log(require(options.from_log, "--from_log"))
    if log is None:
        return None
    for each in (log, retain_log) if retain_log else (log,):
        for text in warnings(each):
            Console(stderr=True).print(f"warning: {text}", markup=False, soft_wrap=True)
    result = summary(log, retain_log)
    if model := options.model:
        from training import processes

        processes.on_main(lambda: write_results(options, model, result))
        if not processes.is_main():
            return result
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(result_table(result))
    return result


def _evaluated(options: EvaluateOptions, model: Path) -> EvalLog | None:
    """The log of a model, written to --out; None where it is a dry run."""
    from rich.progress import Progress
    from transformers import AutoTokenizer

    from training import processes
    from training.eval_sets import load_eval_sets
    from training.evaluate_model import evaluate_model, num_parameters
    from training.model import load_model, pick_device
    from training.templates import Format

    if not (model / "config.json").is_file():
        raise ValueError(
            f"expected a model folder with config.json, got --model {model}; save the model with "
            "save_pretrained, tokenizer included"
        )
    sets, device = load_eval_sets(options.data_dir, options.forget_percent, options.rows), pick_device(options.device)
    if options.dry_run:
        print(json.dumps(settings(options, model), indent=2))
        for name, rows in sets.items():
            answers = len(rows) * (3 + len(rows[0].perturbed))  # the true one twice: probabilities, then tokens
            print(f"{NAMES[name]}: {len(rows)} questions, {answers} answers to score, {len(rows)} to generate")
        mebibytes = num_parameters(model) * 4 / 2**20
        print(f"on {device}; weights {mebibytes:.0f} MiB in float32; the logits of a batch are never formed")
        return None
    format = Format(AutoTokenizer.from_pretrained(model), options.template)
    with Progress(console=Console(stderr=True), disable=not processes.is_main()) as progress:
        bars = {name: progress.add_task(NAMES[name], total=len(rows)) for name, rows in sets.items()}
        log = evaluate_model(
            load_model(model, device),
            format,
            sets,
            name=str(options.out / LOG_FILE),
            layout=options.layout,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            on_rows=lambda name, count: progress.advance(bars[name], count),
        )
    # before anything can be wrong with the retain log
    processes.on_main(lambda: write_log(options.out / LOG_FILE, log))
    return log


def write_results(options: EvaluateOptions, model: Path, result: dict[str, Any]) -> None:
    from training.versions import versions

    write_json(options.out / "metrics.json", result)
    write_json(options.out / "config.json", {"settings": settings(options, model), "versions": versions()})
    headings, rows = table_cells(result)
    lines = [headings, ["---:"] * len(headings), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    write_text(
        options.out / "report.md",
        f"# Evaluation of {_name(model)}\n\n{headline(result)}\n\n{text}\n\n{LEGEND}.\n",
    )


def _name(folder: Path) -> str:
    """`runs/full/model` is `full`."""
    return folder.parent.name if folder.name == "model" else folder.name


def settings(options: EvaluateOptions, model: Path) -> dict[str, Any]:
    """The options without paths; of the model and the retain log, the names."""
    paths = {"model": _name(model), "retain_log": options.retain_log.name if options.retain_log else None}
    return {
        k: v
        for k, v in (asdict(options) | paths).items()
        if k not in ("from_log", "json", "data_dir", "out", "dry_run")
    }


def headline(result: dict[str, Any]) -> str:
    quality = result["forget_quality"]
    return (
        f"Model utility {result['model_utility_geometric']:.4f} (geometric truth ratio; arithmetic "
        f"{result['model_utility_arithmetic']:.4f}). Forget quality: "
        + ("no --retain_log to compare with." if quality is None else f"p = {quality:.4g}.")
    )


def table_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and one row a set; a measure that the log does not allow is a dash."""
    rows = []
    for name, label in NAMES.items():
        values = [result.get(f"{name}_{key}") for key in MEASURES]
        rows.append([label] + ["-" if value is None else f"{value:.3f}" for value in values])
    return ["set", *MEASURES.values()], rows


def result_table(result: dict[str, Any]) -> Table:
    headings, rows = table_cells(result)
    table = Table(title=headline(result), caption=LEGEND)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "set" else "right")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    chosen = parse(EvaluateOptions, PROG, __doc__)
    try:
        main(chosen)
    except (ValueError, OSError, ImportError) as reason:
        stop(PROG, reason)
