"""The runs of an experiment, in order. Each has its folder and is skipped when it is finished there."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from rich.console import Console

from training import evaluate, finetune, processes, tiny, unlearn
from training.command import model_fingerprint
from training.data import HUB, load_rows
from training.eval_log import read_log
from training.eval_sets import load_eval_sets
from training.methods import METHODS, Compat
from training.model import pick_device
from training.presets import PRESETS, filled_in
from training.require import require
from training.stages import fingerprint, finished, remove, write_json
from training.summary import summary


@dataclass(frozen=True)
class ExperimentOptions:
    """Lists are separated by commas. None is filled in by the preset, as in the commands that this one runs."""

    preset: Annotated[
        str | None,
        "hyper-parameters; tiny makes its own model to start from, and is the default if no --model",
        tuple(PRESETS),
    ] = None
    model: Annotated[str | None, "folder or hub name of the model that is fine-tuned"] = None
    template: Annotated[str | None, "how a question is put"] = None
    data_dir: Annotated[str, "folder with TOFU's JSON lines, or a data set of the hub"] = HUB
    out: Annotated[Path, "folder of the experiment"] = Path("runs/experiment")
    forget_percents: Annotated[str, "forget sets"] = "10"
    methods: Annotated[str, f"objectives, of {', '.join(METHODS)}"] = "ga,ga_rt,dpo_rt,kto_rt,npo,npo_rt,simnpo_rt"
    seeds: Annotated[str, "of unlearning; there is one fine-tuned model"] = "0,1,2"
    epochs: Annotated[int | None, "of unlearning"] = None
    lr: Annotated[float | None, "of unlearning"] = None
    batch_size: Annotated[int | None, "rows a step"] = None
    micro_batch_size: Annotated[int | None, "rows of a kind at a time in one process"] = None
    beta: Annotated[float | None, "of every method; default: each method's own"] = None
    forget_weight: Annotated[float | None, "of the term on the forget rows; default: each method's own"] = None
    retain_weight: Annotated[float, "of the term on the retain rows"] = 1.0
    compat: Annotated[Compat, "npo-repo: the NPO paper's code where it differs from the paper"] = "paper"
    lora_rank: Annotated[int, "unlearn by adapters of this rank; 0: all weights"] = 0
    gradient_checkpointing: Annotated[bool | None, "recompute activations in the backward"] = None
    use_liger_kernel: Annotated[bool, "Liger's kernels for the layers below the head"] = False
    packing: Annotated[bool | None, "rows one after another, no padding"] = None
    attn_implementation: Annotated[str | None, "flash_attention_2, sdpa, eager, ..."] = None
    finetune_epochs: Annotated[int | None, "of fine-tuning, on all rows and on those to keep"] = None
    finetune_lr: Annotated[float | None, "of fine-tuning"] = None
    world: Annotated[
        bool | None, "fine-tune on real authors and world facts as well; a tiny model knows nothing else"
    ] = None
    hidden_size: Annotated[int, "width of a tiny model"] = 512
    layers: Annotated[int, "layers of a tiny model"] = 1
    eval_epochs: Annotated[int, "epochs between evaluations"] = 1
    eval_rows: Annotated[int, "first rows of every evaluation set; 0: all"] = 300
    eval_batch_size: Annotated[int, "sequences a forward or generation in evaluation"] = 32
    max_new_tokens: Annotated[int, "longest greedy answer"] = 200
    keep_models: Annotated[bool, "keep every unlearned model, not only their figures"] = False
    device: Annotated[str, "auto, cuda, mps or cpu"] = "auto"
    dry_run: Annotated[bool, "print the runs, and stop"] = False


class Cell(NamedTuple):
    """A run of the grid."""

    percent: int
    method: str
    seed: int

    @property
    def folder(self) -> str:
        return f"forget{self.percent:02d}/{self.method}/seed{self.seed}"


class Grid:
    def __init__(self, options: ExperimentOptions):
        if options.preset is None and options.model is None:
            options = replace(options, preset="tiny")
        self.options, self.console = options, Console(stderr=True, quiet=not processes.is_main())
        percents, seeds = (_numbers(options, name) for name in ("forget_percents", "seeds"))
        methods = [name.strip() for name in options.methods.split(",")]
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
        self.cells = [Cell(p, m, s) for p in percents for m in methods for s in seeds]
        self.percents, self.methods = percents, methods

    def run(self) -> dict[str, Any]:
        """What metrics.json holds.

        {"rows": {split: how many were learned}, "start", "retrained": {percent: summary},
        "runs": [{"percent", "method", "seed", "history"}],
        "samples": {percent: {moment or method: greedy answers, those of the first seed}}}
        """
        rows, start, retrained, runs = {}, {}, {}, []
        samples: dict[str, dict[str, Any]] = {}
        full, rows["full"] = self._finetuned("full")
        for percent in self.percents:
            split = f"retain{100 - percent:02d}"
            kept, rows[split] = self._finetuned(split)
            retrained[str(percent)], retain_log = self._evaluated(kept, percent)
            start[str(percent)], start_log = self._evaluated(full, percent, retain_log)
            for cell in (c for c in self.cells if c.percent == percent):
                self.console.rule(f"{cell.folder} ({self.cells.index(cell) + 1} of {len(self.cells)})")
                options = self._unlearn_options(cell, full, start_log, retain_log)
                metrics = require(unlearn.main(options), "the metrics of a run that is not dry")
                runs.append({**cell._asdict(), "history": metrics["history"]})
                answers = samples.setdefault(str(percent), {"before": metrics["samples"]["before"]})
                answers.setdefault(METHODS[cell.method].label, metrics["samples"]["after"])
        return {"rows": rows, "start": start, "retrained": retrained, "runs": runs, "samples": samples}

    def _start_model(self) -> str:
        o = self.options
        if o.model is not None:
            return o.model
        if o.preset != "tiny":
            return PRESETS[require(o.preset, "--preset or --model")]["both"]["model"]
        base = o.out / f"base_{o.hidden_size}x{o.layers}"
        make = tiny.TinyOptions(o.data_dir, out=base, hidden_size=o.hidden_size, layers=o.layers)
        if not (base / "config.json").exists():
            processes.wait()
            processes.on_main(lambda: tiny.main(make))
        return str(base)

    def _finetuned(self, split: str) -> tuple[str, int]:
        """(folder of the model that learned `split`, how many rows that were)"""
        o = self.options
        same = ("batch_size", "micro_batch_size", "packing", "attn_implementation", "use_liger_kernel")
        shared = {name: getattr(o, name) for name in (*same, "gradient_checkpointing")}
        self.console.rule(f"Fine-tuning on {split}")
        options = finetune.FinetuneOptions(
            preset=o.preset,
            model=self._start_model(),
            template=o.template,
            data_dir=o.data_dir,
            out=o.out / split,
            device=o.device,
            epochs=o.finetune_epochs,
            lr=o.finetune_lr,
            split=split,
            world=o.preset == "tiny" if o.world is None else o.world,
            **shared,
        )
        metrics = require(finetune.main(options), "the metrics of a run that is not dry")
        return str(o.out / split / "model"), metrics["rows"]

    def _evaluated(self, model: str, percent: int, retain_log: Path | None = None) -> tuple[dict[str, Any], Path]:
        """(metrics, log) of a model on the sets of a forget percentage."""
        o = self.options
        folder = o.out / "evaluation" / f"{Path(model).parent.name}_forget{percent:02d}"
        sizes = {"rows": o.eval_rows, "batch_size": o.eval_batch_size, "max_new_tokens": o.max_new_tokens}
        sets = load_eval_sets(o.data_dir, percent, o.eval_rows)
        rows = {name: [asdict(row) for row in some] for name, some in sets.items()}
        key = fingerprint([model_fingerprint(model), rows, sizes, pick_device(o.device).type])
        log, record = folder / evaluate.LOG_FILE, folder / "stage.json"
        found = finished(record, key) is not None
        processes.wait()
        if not found:
            processes.on_main(lambda: remove(record))  # or a kill could leave it beside a newer log
            evaluate.main(
                evaluate.EvaluateOptions(
                    model=Path(model),
                    data_dir=o.data_dir,
                    forget_percent=percent,
                    out=folder,
                    device=o.device,
                    rows=o.eval_rows,
                    batch_size=o.eval_batch_size,
                    max_new_tokens=o.max_new_tokens,
                )
            )  # in the template that fine-tuning left in the model's folder
            processes.on_main(lambda: write_json(record, {"key": key}))
        return summary(read_log(log), read_log(retain_log) if retain_log else None), log

    def _unlearn_options(self, cell: Cell, full: str, start_log: Path, retain_log: Path) -> unlearn.UnlearnOptions:
        o = self.options
        same = {f.name for f in fields(unlearn.UnlearnOptions)} & {f.name for f in fields(o)}
        rows = len(load_rows(o.data_dir, f"forget{cell.percent:02d}"))
        batch = require(filled_in(o, "unlearn").batch_size, "a batch size")
        return unlearn.UnlearnOptions(
            **{name: getattr(o, name) for name in same - {"model", "out", "dry_run"}},
            model=full,
            out=o.out / cell.folder,
            method=cell.method,
            forget_percent=cell.percent,
            seed=cell.seed,
            eval_steps=o.eval_epochs * -(-rows // batch),
            reference_cache=o.out / "reference",
            start_log=start_log,
            retain_log=retain_log,
            save_model=o.keep_models,
        )

    def plan(self) -> Iterator[str]:
        """What --dry_run prints."""
        yield f"fine-tune {self.options.model or self.options.preset} on full"
        for percent in self.percents:
            yield f"fine-tune it on retain{100 - percent:02d}, evaluate both"
        yield from (f"unlearn {cell.folder}" for cell in self.cells)
        yield "\n".join(f"{name}: {value}" for name, value in asdict(self.options).items())


def _numbers(options: ExperimentOptions, name: str) -> list[int]:
    text = str(getattr(options, name))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}") from None
