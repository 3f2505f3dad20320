"""Scenarios x methods x seeds of unlearning, with one table, figures and a verdict at the end.

    python -m training.grid --data_dir path/to/tofu --forget_percents 5 --seeds 0,1,2 --out runs/grid
    python -m training.grid --preset llama-3.2-1b --forget_percents 1,5,10 --seeds 0,1,2,3,4
    python -m training.grid --preset methods --out runs/methods       every family of methods, small, ranked
    python -m training.grid --benchmark muse --data_dir demo --forget_sets sust_1,sust_2 --out runs/requests

Fine-tunes one model on all rows, and for every forget set one on the rows to keep, whose answers are what forgetting is
measured against. Then every method unlearns with every seed, evaluated on the way. Forget sets that come one after
another are unlearned so: each from the model that the same method and seed left at the request before, which is kept.
All runs are resumed where they were interrupted, and what is finished is not run again. --out gets report.md,
report.html (a page to look at, of one file), metrics.json, config.json, two figures for each forget set, one for a
series of them, and the folders of the runs.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from rich.console import Console

from training import distributed
from training.benchmarks import Benchmark
from training.benchmarks.tofu.data import HUB
from training.commands import alternates, authors, evaluate, finetune, tiny, unlearn
from training.commands.attack_options import AttackedOptions
from training.commands.method_options import MethodOptions
from training.commands.options import build, command_line, words_of
from training.commands.run_folder import public
from training.commands.session import SessionOptions, device_name
from training.locks import alone
from training.methods import METHODS, method_named
from training.model import pick_device
from training.reports.grid import write_grid_report
from training.require import require
from training.store import check_writable, remove
from training.versions import versions

PROG = "training.grid"
DEFAULT_OUT = Path("runs/grid")
FROM_NOTHING = ("tiny", "methods")  # presets whose models are made here
# Of this command's options, those that fine-tuning takes as they are.
OF_FINETUNING = (
    *("benchmark", "template", "device", "batch_size", "micro_batch_size", "gradient_accumulation_steps", "packing"),
    *("precision", "attn_implementation", "use_liger_kernel", "gradient_checkpointing"),
    *("save_every_minutes", "seed", "fresh"),
)
# And those of every run of unlearning that are its own.
OF_CELL = ("model", "out", "seed", "dry_run", "preset", "alternates")


@dataclass(frozen=True)
class GridOptions(AttackedOptions, MethodOptions, SessionOptions):
    """The grid. Lists are separated by commas.

    The options of training are those of unlearning; fine-tuning takes its batches, packing and precision of them.
    """

    stage: ClassVar[str] = "unlearn"
    default_preset: ClassVar[str] = "tiny"
    methods: Annotated[str, lambda: f"objectives, of {', '.join(METHODS)}"] = (
        "ga,ga_rt,dpo_rt,kto_rt,npo,npo_rt,simnpo_rt"
    )
    seeds: Annotated[str, "of unlearning; there is one fine-tuned model"] = "0,1,2"
    forget_percents: Annotated[str | None, "forget sets, where the benchmark has several. None: its one"] = None
    forget_sets: Annotated[
        str | None, "the same by the benchmark's names: percents of TOFU, scal_1,scal_2 or sust_1,sust_2 of MUSE"
    ] = None
    finetune_epochs: Annotated[int | None, "of fine-tuning, on all rows and those to keep. None: the preset's"] = None
    finetune_lr: Annotated[float | None, "of fine-tuning. None: the preset's"] = None
    world: Annotated[bool | None, "fine-tune on what is asked about the world as well. None: a tiny model"] = None
    hidden_size: Annotated[int, "width of a tiny model"] = 512
    layers: Annotated[int, "layers of a tiny model"] = 1
    retrain: Annotated[bool, "train the model that never saw the forget set, which forget quality compares with"] = True
    generate_authors: Annotated[
        int, "write so many fictitious authors in TOFU's files to --out/data, unless --data_dir is given; 0: none"
    ] = 0
    alternates: Annotated[
        Path | None, "AltPO: file of other answers. None: the benchmark's, or made by the model that learned all"
    ] = None
    keep_models: Annotated[bool, "keep every unlearned model, not only their figures"] = False


class Cell(NamedTuple):
    """A run of the grid."""

    scenario: str
    method: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.scenario}/{self.method}/seed{self.seed}"


class Start(NamedTuple):
    """The model that a run starts from, and what is known of that very model."""

    model: str
    log: Path | None = None  # None: the run evaluates it
    reference_cache: Path | None = None  # None: in the folder of the run


class Grid:
    def __init__(self, options: GridOptions, benchmark: Benchmark, console: Console | None = None):
        self.out = options.out or DEFAULT_OUT
        self.options, self.benchmark = options, benchmark
        self.console = console or Console(stderr=True, quiet=not distributed.is_main())
        options.check_attacks()  # what is misspelt is said before hours of training
        self.benchmarks = {b.scenario: b for b in scenarios(benchmark, options.forget_percents, options.forget_sets)}
        names = [name.strip() for name in options.methods.split(",") if name.strip()]
        self.methods = list(dict.fromkeys(method_named(name).name for name in names))
        seeds = _numbers("seeds", options.seeds)
        self.cells = [Cell(b, m, s) for b in self.benchmarks for m in self.methods for s in seeds]
        self.followed = {b.follows for b in self.benchmarks.values()}

    def _check_rows(self) -> None:
        """ValueError where a forget set is not there, or a method compares answers and its rows are plain text."""
        others = [name for name in self.methods if {"idk", "alternate"}.intersection(METHODS[name].needs)]
        for benchmark in self.benchmarks.values():
            rows = benchmark.rows("forget")
            if others and not all("question" in row for row in rows):
                raise ValueError(
                    f"--methods: {', '.join(others)} compare answers to questions, and {benchmark.title} forgets plain "
                    "text; leave them out"
                )

    def run(self) -> dict[str, Any]:
        """What metrics.json holds.

        {"rows": {split: how many were learned}, "start", "retrained": {scenario: summary},
        "runs": [{"scenario", "method", "seed", "history", "step_zero", "attacks"}],
        "samples": {scenario: {moment or method: greedy answers, those of the first seed}}}
        """
        self._check_rows()
        rows, start, retrained, runs = {}, {}, {}, []
        samples: dict[str, dict[str, Any]] = {}
        if self.options.fresh:
            distributed.on_main(lambda: remove(self.out / "reference"))
        full, rows["full"] = self._finetuned("full")
        for name, benchmark in self.benchmarks.items():
            retain_log = None
            if self.options.retrain:
                kept, rows[benchmark.retain_split] = self._finetuned(benchmark.retain_split)
                retrained[name], retain_log = self._evaluated(kept, benchmark)
            start[name], start_log = self._evaluated(full, benchmark, retain_log)
            others = self._alternates(full, benchmark)
            for cell in (c for c in self.cells if c.scenario == name):
                self.console.rule(f"{cell.folder} ({self.cells.index(cell) + 1} of {len(self.cells)})")
                run = unlearn.main(
                    *self._unlearn_options(cell, self._start_of(cell, full, start_log), retain_log, others)
                )
                metrics = require(run, "the metrics of a run that is not dry")
                runs.append({**cell._asdict(), **{key: metrics[key] for key in ("history", "step_zero", "attacks")}})
                answers = samples.setdefault(name, {"before": benchmark.samples(benchmark.read(start_log))})
                answers.setdefault(METHODS[cell.method].label, metrics["samples"]["after"])
        return {"rows": rows, "start": start, "retrained": retrained, "runs": runs, "samples": samples}

    def _start_model(self) -> str:
        o = self.options
        if o.model is not None:
            return o.model
        if o.preset not in FROM_NOTHING:
            raise ValueError(f"--preset {o.preset} names no model: expected --model, the one to fine-tune")
        base = self.out / f"base_{o.hidden_size}x{o.layers}"
        if distributed.is_main():
            same = {"benchmark": o.benchmark, "hidden_size": o.hidden_size, "layers": o.layers, "seed": o.seed}
            tiny.main(*build(tiny.TinyOptions, **same, out=base, fresh=o.fresh, **asdict(self.benchmark.options)))
        distributed.wait()
        return str(base)

    def _finetuned(self, split: str) -> tuple[str, int]:
        """(folder of the model that learned `split`, how many rows that were)"""
        o = self.options
        self.console.rule(f"Fine-tuning on {split}")
        epochs_and_lr = {"epochs": o.finetune_epochs, "lr": o.finetune_lr}
        chosen = build(
            finetune.FinetuneOptions,
            preset=o.preset,
            model=self._start_model(),
            out=self.out / split,
            split=split,
            world=o.preset in FROM_NOTHING if o.world is None else o.world,
            **{name: getattr(o, name) for name in OF_FINETUNING},
            **{name: value for name, value in epochs_and_lr.items() if value is not None},
            **asdict(self.benchmark.options),
        )
        metrics = require(finetune.main(*chosen), "the metrics of a run that is not dry")
        return str(self.out / split / "model"), metrics["rows"]

    def _evaluated(
        self, model: str, benchmark: Benchmark, retain_log: Path | None = None
    ) -> tuple[dict[str, Any], Path]:
        """(summary, log) of a fine-tuned model, in the template that fine-tuning left in its folder."""
        key = benchmark.key()  # forget sets that are evaluated alike share what was measured
        benchmark = next(b for b in self.benchmarks.values() if b.key() == key)
        folder = Path(model).parent / f"evaluation_{benchmark.scenario}"
        options = evaluate.EvaluateOptions(
            model=Path(model), benchmark=benchmark.name, out=folder, retain_log=retain_log,
            device=self.options.device, precision=self.options.precision, fresh=self.options.fresh,
        )  # fmt: skip
        summary = require(evaluate.main(options, benchmark), "the metrics of a run that is not dry")
        return summary, folder / evaluate.LOG_FILE

    def _alternates(self, model: str, benchmark: Benchmark) -> Path | None:
        """The file of other answers that AltPO takes, made by the model if there is none."""
        o, needed = self.options, any("alternate" in METHODS[name].needs for name in self.methods)
        if o.alternates is not None or not needed or benchmark.alternates():
            return o.alternates
        made = alternates.AlternatesOptions(
            model=Path(model), benchmark=benchmark.name, out=self.out / f"alternates_{benchmark.scenario}.jsonl",
            device=o.device, precision=o.precision, fresh=o.fresh,
        )  # fmt: skip
        return alternates.main(made, benchmark)

    def _start_of(self, cell: Cell, full: str, log: Path) -> Start:
        """Where a run begins: the model that learned all, or the one that the request before has left."""
        before = self.benchmarks[cell.scenario].follows
        if before is None:
            return Start(full, log, self.out / "reference")
        return Start(str(self.out / cell._replace(scenario=before).folder / "model"))

    def _unlearn_options(
        self, cell: Cell, start: Start, retain_log: Path | None, others: Path | None
    ) -> tuple[Any, ...]:
        o, benchmark = self.options, self.benchmarks[cell.scenario]
        same = {f.name for f in fields(unlearn.UnlearnOptions)} & {f.name for f in fields(o)} - set(OF_CELL)
        options = unlearn.UnlearnOptions(
            **{name: getattr(o, name) for name in same},
            preset=o.preset,
            model=start.model,
            out=self.out / cell.folder,
            method=cell.method,
            seed=cell.seed,
            reference_cache=start.reference_cache,
            start_log=start.log,
            retain_log=retain_log,
            alternates=others,
            save_model=o.keep_models or cell.scenario in self.followed,
        )
        return options, benchmark

    def plan(self) -> Iterator[str]:
        """What --dry_run prints."""
        yield f"fine-tune {self.options.model or self.options.preset} on full"
        for benchmark in self.benchmarks.values():
            yield f"fine-tune it on {benchmark.retain_split}, evaluate both" if self.options.retrain else "evaluate it"
        for cell in self.cells:
            before = self.benchmarks[cell.scenario].follows
            yield f"unlearn {cell.folder}" + (f", from {cell._replace(scenario=before).folder}" if before else "")
        yield "\n".join(f"{name}: {value}" for name, value in public(self.options, self.benchmark.options).items())


def _with_authors(options: GridOptions, benchmark: Benchmark) -> Benchmark:
    """The benchmark on generated authors, where these are asked for and no folder is given."""
    o = benchmark.options
    if not options.generate_authors or getattr(o, "data_dir", None) != HUB:
        return benchmark
    folder = (options.out or DEFAULT_OUT) / "data"
    made = authors.AuthorsOptions(out=folder, authors=options.generate_authors, fresh=options.fresh)
    distributed.on_main(lambda: authors.main(made))
    return type(benchmark)(replace(o, data_dir=str(folder)))


def scenarios(benchmark: Benchmark, forget_percents: str | None, forget_sets: str | None = None) -> list[Benchmark]:
    """The benchmark with each of these forget sets; None: as it is."""
    both = {"forget_percents": forget_percents, "forget_sets": forget_sets}
    given = {option: names for option, names in both.items() if names is not None}
    if len(given) > 1:
        raise ValueError("expected --forget_percents or --forget_sets, got both: they say the same thing")
    chosen = [benchmark]
    for option, names in given.items():
        try:
            chosen = benchmark.scenarios(names)
        except ValueError as reason:
            raise ValueError(f"--{option}: {reason}") from None
    for number, each in enumerate(chosen):
        if each.follows and each.follows not in (b.scenario for b in chosen[:number]):
            raise ValueError(
                f"{each.scenario} starts from the model that has forgotten {each.follows}: expected both in "
                f"--forget_sets, in this order, got {', '.join(b.scenario for b in chosen)}"
            )
    return chosen


def _numbers(name: str, text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}") from None


def command_of(settings: dict[str, Any]) -> str:
    """The command line of a grid with the settings of its config.json, without its paths and what is so anyway."""
    first = "model" if settings["preset"] is None else "preset"
    named = {name: settings[name] for name in (first, "benchmark")}
    options, benchmark = build(GridOptions, **named)
    usual = public(options, benchmark.options)
    chosen = {name: value for name, value in settings.items() if value not in (None, usual.get(name))}
    return shlex.join(["python", "-m", PROG, *words_of(GridOptions, named | chosen)])


def main(options: GridOptions, benchmark: Benchmark, console: Console | None = None) -> dict[str, Any] | None:
    """metrics.json; None after --dry_run."""
    if options.dry_run:
        print("\n".join(Grid(options, benchmark, console).plan()))
        return None
    with alone(options.out or DEFAULT_OUT):
        return _run(options, _with_authors(options, benchmark), console)


def _run(options: GridOptions, benchmark: Benchmark, console: Console | None) -> dict[str, Any]:
    grid = Grid(options, benchmark, console)
    distributed.on_main(lambda: check_writable(grid.out, "--out"))
    metrics = grid.run()
    device = device_name(pick_device(options.device))
    settings = public(options, benchmark.options)
    config = {"settings": settings, "command": command_of(settings), "device": device, "versions": versions()}
    report = grid.out / "config.json"
    if report.exists() and _settings_of(report) != settings:
        grid.console.print(f"{grid.out}: report.md was of another choice of runs and is written anew; the runs stay")
    distributed.on_main(lambda: write_grid_report(grid.out, metrics, config, list(grid.benchmarks.values())))
    return metrics


def _settings_of(config: Path) -> Any:
    """None where it is damaged."""
    try:
        return json.loads(config.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    command_line(PROG, GridOptions, __doc__, main)
