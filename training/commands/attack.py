"""Attack an unlearned model and measure what it remembers, with the same metrics before and after.

    python -m training.attack quantize --model DIR --data_dir path/to/tofu --forget_percent 10
    python -m training.attack relearn  --model DIR --data_dir path/to/tofu --forget_percent 10 --fraction 0.2

quantize rounds the weights of every linear layer but the head to 8 and to 4 bits, evenly spaced with one scale a row,
and to NormalFloat4 in blocks of 64 (training/quantization.py); arithmetic stays in float32. Zhang et al. 2025, arXiv
2410.16454, found that forgotten text comes back at 4 bits. relearn fine-tunes on a seeded fraction of the forget set
and records the answer probability after every step, on the relearned rows and on the other forget rows. Both write
metrics.json, config.json, report.md and figure.png to --out. A model that withstands both may still fail to another
attack: this is no proof of forgetting.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from transformers import PreTrainedModel

from training import distributed
from training.benchmarks import BENCHMARKS, Benchmark
from training.commands.options import command_line
from training.commands.run_folder import RunFolder, model_name
from training.commands.session import device_name, measured, model_fingerprint
from training.commands.told import tell_warnings
from training.config import Precision, TrainConfig
from training.loading import load_tokenizer
from training.model import load_model, pick_device
from training.progress import progress
from training.quantization import FORMATS, rounded
from training.relearning import relearn_, split
from training.reports import tables
from training.reports.figures import COLOURS, drawn
from training.store import fingerprint, write_text
from training.templates import Format

PROG = "training.attack"
CAVEAT = "A model that withstands these attacks may fail to others: unlearning is no guarantee."


@dataclass(frozen=True)
class AttackOptions:
    """The attack."""

    attack: Annotated[tyro.conf.Positional[Literal["quantize", "relearn"]], "the attack"] = tyro.MISSING
    model: Annotated[Path | None, "folder of the unlearned model, tokenizer included"] = None
    benchmark: Annotated[str, lambda: f"benchmark whose metrics are computed: {', '.join(BENCHMARKS)}"] = "tofu"
    retain_log: Annotated[
        Path | None, "evaluation log of a model trained without the forget set; needed for the forget quality"
    ] = None
    template: Annotated[
        str, "prompt template (training/templates.py); auto: chosen by the tokenizer's chat template"
    ] = "auto"
    precision: Annotated[Precision, "of the arithmetic; auto: bf16 on a GPU that supports it, fp32 elsewhere"] = "auto"
    batch_size: Annotated[int, "relearn: rows per step"] = 32
    fraction: Annotated[float, "relearn: share of the forget set to fine-tune on"] = 0.2
    epochs: Annotated[int, "relearn: epochs over it"] = 5
    lr: Annotated[float, "relearn: peak learning rate"] = 1e-5
    seed: Annotated[int, "relearn: seed of the rows and the batches"] = 0
    out: Annotated[Path | None, "folder for the results. None: runs/attack_{quantize,relearn}"] = None
    fresh: Annotated[bool, "remove the results of another attack from --out"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    dry_run: Annotated[bool, "print the settings and stop"] = False


def main(options: AttackOptions, benchmark: Benchmark) -> dict[str, Any] | None:
    """{"stages": {name: metrics}, "history": [...]}; None after --dry_run."""
    if options.model is None or not (options.model / "config.json").is_file():
        raise ValueError(f"expected --model, the folder of an unlearned model, got {options.model}; see --help")
    if not 0 < options.fraction < 1:
        raise ValueError(f"--fraction: expected a share between 0 and 1, got {options.fraction}")
    out = options.out or Path(f"runs/attack_{options.attack}")
    folder = RunFolder(out, options, benchmark.options)
    if options.dry_run:
        print(tables.settings_line(folder.settings))
        return None
    with folder.alone():
        return _attacked(options, options.model, benchmark, folder)


def _attacked(options: AttackOptions, start: Path, benchmark: Benchmark, folder: RunFolder) -> dict[str, Any]:
    out, device = folder.path, pick_device(options.device)
    format = Format(load_tokenizer(start), options.template)
    retrained = benchmark.read(options.retain_log) if options.retain_log else None
    settings = {k: v for k, v in folder.settings.items() if k not in ("model", "device")}
    depends_on = [str(settings), benchmark.key(), model_fingerprint(str(start)), format.hash(), device.type]
    found = folder.begin(fingerprint([*depends_on, str(retrained)]), options.fresh)
    if found is not None:
        Console(stderr=True).print(f"{out} is finished: nothing is run again", markup=False)
        return found
    model = load_model(start, device, precision=options.precision)
    stages: dict[str, dict[str, Any]] = {}
    history: list[dict[str, float]] = []
    with progress() as display:

        def evaluate(attacked: PreTrainedModel, name: str) -> None:
            measures = measured(benchmark, attacked, format, out / "eval" / f"{name}.json", display)
            stages[name] = benchmark.summarize(measures, retrained)
            if name == "unlearned":
                tell_warnings(benchmark, measures, retrained)

        evaluate(model, "unlearned")
        if options.attack == "quantize":
            for name in FORMATS:
                with rounded(model, name):
                    evaluate(model, name)
        else:
            examples = benchmark.encode(format, benchmark.rows("forget"))
            relearned, others = split(examples, options.fraction, options.seed)
            config = TrainConfig(options.epochs, options.lr, options.batch_size, packing="off", seed=options.seed)
            history = relearn_(model, relearned, others, format.pad_token_id, config)
            evaluate(model, "relearned")
    result = {"stages": stages, "history": history}
    distributed.on_main(lambda: _write_report(out, options, benchmark, result))
    return folder.finish(result, device=device_name(device))


def _write_report(out: Path, options: AttackOptions, benchmark: Benchmark, result: dict[str, Any]) -> None:
    _plot(result, benchmark, out / "figure.png")
    shown = {
        k: c.heading
        for k, c in benchmark.columns.items()
        if any(m.get(k) is not None for m in result["stages"].values())
    }
    rows = [[name, *(metrics.get(key) for key in shown)] for name, metrics in result["stages"].items()]
    table = tables.markdown(["", *shown.values()], rows)
    title = f"# {options.attack.capitalize()} attack on {model_name(options.model or '')}"
    text = "\n\n".join([title, table, benchmark.legend, "![Before and after](figure.png)", CAVEAT])
    write_text(out / "report.md", text + "\n")
    print(table)


def _plot(result: dict[str, Any], benchmark: Benchmark, path: Path) -> None:
    """Recovery over steps, or the numbers between 0 and 1 by stage."""
    with drawn(path) as axes:
        axis = axes[0, 0]
        if result["history"]:
            steps = [h["step"] for h in result["history"]]
            for key, label, colour in (
                ("relearned", "rows it relearns", COLOURS[0]),
                ("others", "other forget rows", COLOURS[1]),
            ):
                axis.plot(steps, [h[key] for h in result["history"]], color=colour, label=label, linewidth=2)
            axis.set(xlabel="relearning step", ylabel="answer probability", ylim=(0, None))
        else:
            names, columns = list(result["stages"]), benchmark.columns
            shown = [key for key in columns if key in ("forget_prob", "retain_prob")] or list(columns)[:2]
            for shift, key, colour in zip((-0.2, 0.2), shown, COLOURS, strict=False):
                heights = [metrics[key] for metrics in result["stages"].values()]
                axis.bar([i + shift for i in range(len(names))], heights, 0.4, color=colour, label=columns[key].heading)
            axis.set(xticks=range(len(names)), xticklabels=names)
        axis.legend(frameon=False)


if __name__ == "__main__":
    command_line(PROG, AttackOptions, __doc__, main)
