"""The stages of the study on a pre-trained model. Each is a run of another command; finished ones are skipped.

Several processes may work on one folder: each takes the first free stage whose inputs exist. A stage with a record is
not run again, even on another machine. A model is trained again only if a stage without a record needs it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.benchmark import TofuOptions
from training.commands import evaluate, finetune, unlearn
from training.commands.options import build
from training.commands.session import measured, model_fingerprint
from training.config import TrainConfig
from training.loading import load_tokenizer
from training.model import load_model, pick_device
from training.pretrained import choice, part
from training.pretrained.plan import PERCENTS, ROUNDED, Plan, Run, Taught, Tried, retrained_on
from training.pretrained.records import Records
from training.progress import progress
from training.quantization import rounded
from training.relearning import relearn_, split
from training.store import fingerprint, finished, write_record
from training.templates import Format

TEMPLATE = "plain"  # a chat template puts twenty tokens of a system message before every question
AGAIN = 5.0  # seconds until a process looks again for a stage that it can take
TUNE = "tune"
RELEARNING: dict[str, Any] = {"epochs": 5, "batch_size": 8}


class Stage(NamedTuple):
    name: str
    models: tuple[str, ...]  # stages whose model it reads
    needs: tuple[str, ...]  # stages whose record it reads
    run: Callable[[], object]
    recorded: bool = True  # no record is missing; of a fine-tuned model there is none


class Study:
    """The study of `plan`, from the model in the folder `base`, in the folder `work`, with records in `out`."""

    def __init__(self, plan: Plan, base: Path, data_dir: str, work: Path, out: Path, console: Console):
        self.plan, self.base, self.data_dir, self.work, self.console = plan, base, data_dir, work, console
        self.records = Records(out)

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Of the rows that are reported, and of those of the choice."""
        with self.alone("rows"):
            return part.write(self.data_dir, self.plan.part, self.work)

    def alone(self, name: str, wait: bool = True) -> FileLock:
        """A context that one process at a time is in. `Timeout` if it does not wait and another process is in it."""
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name.replace(' ', '_')}.lock", blocking=wait)

    # -- where things are ------------------------------------------------------------------------------------------

    def model(self, name: str) -> Path:
        return self.base if name == "base" else self.work / name / "model"

    @cached_property
    def start(self) -> str:
        """sha256 of the model that runs start from. Trained again on another processor, it may differ by rounding."""
        return model_fingerprint(str(self.model("full")))

    def log(self, model: str, rows: str = "data") -> Path:
        """Of a model that is not unlearned: that of this folder, else that of the records."""
        made, kept = self.work / "evaluations" / f"{model}-{rows}" / evaluate.LOG_FILE, self.records.log(model)
        return kept if rows == "data" and kept.exists() and not made.exists() else made

    def run_folder(self, run: Run | Tried) -> Path:
        return self.work / ("tries" if isinstance(run, Tried) else "runs") / run.name

    def attack_log(self, of: str, attack: str) -> Path:
        return self.work / "attacks" / of / attack / evaluate.LOG_FILE

    def benchmark(self, rows: str = "data", percent: int = 10) -> TOFU:
        """All rows of the part's files are evaluated; they are those of the last tenth, whatever is forgotten."""
        folder = str(self.folders[rows])
        return TOFU(
            TofuOptions(data_dir=folder, forget_percent=percent, eval_rows=0, max_new_tokens=self.plan.max_new_tokens)
        )

    # -- the stages ------------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[Stage]:
        """In the order in which they are taken up."""
        first, second = PERCENTS
        again = [taught.seed for taught in self.plan.taught if taught.seed]
        return [
            *self._models({0}),
            *self._tries(),
            *self._runs(first),
            *self._models({*again}),
            *self._runs(second),
        ]

    @property
    def missing(self) -> list[Stage]:
        """The stages without a record, and those whose models they read."""
        found: list[Stage] = []
        read: set[str] = set()
        for stage in reversed(self.stages):
            if not stage.recorded or stage.name in read:
                found.insert(0, stage)
                read |= {*stage.models}
        return found

    def _models(self, seeds: Set[int]) -> Iterator[Stage]:
        """Fine-tuned, and evaluated on the rows that are reported; the first ones on those of the choice as well."""
        taught = [each for each in self.plan.taught if each.seed in seeds]
        for each in taught:
            yield Stage(each.name, (), (), partial(self.teach, each))
        tuned_on = [(name, TUNE) for name in ("full", "retain50") if 0 in seeds]
        tried = self.records.has_tries(self.plan.tries)
        for name, rows in [*tuned_on, *((each.name, "data") for each in taught)]:
            recorded = tried if rows == TUNE else self.records.has_model(name)
            what = f"evaluation of {name} on {rows}"
            yield Stage(what, (name,), (), partial(self.evaluate, name, rows), recorded)
        if 0 in seeds:
            recorded = self.records.has_model("base")
            yield Stage("evaluation of base on data", (), (), partial(self.evaluate, "base", "data"), recorded)

    def _tries(self) -> Iterator[Stage]:
        needs = ("evaluation of full on tune", "evaluation of retain50 on tune")
        for tried in self.plan.tries:
            recorded = self.records.has_tries([tried])
            yield Stage(f"try {tried.name}", ("full",), needs, partial(self.try_out, tried), recorded)

    def _runs(self, scenario: str) -> Iterator[Stage]:
        """With the attacks on what they leave, and on the models that these are compared with."""
        tried = tuple(f"try {tried.name}" for tried in self.plan.tries)
        logs = ("evaluation of full on data", f"evaluation of {retrained_on(scenario)} on data")
        runs, tries = [run for run in self.plan.runs() if run.scenario == scenario], self.tries()
        for name in self.plan.controls if any(run.attacked for run in runs) else ():
            yield self._attacks(name, self.model(name), tried)
        for run in runs:
            recorded = self._unlearned(run, tries, self.records)
            yield Stage(run.name, ("full",), (*tried, *logs), partial(self.unlearn, run), recorded)
            if run.attacked:
                yield self._attacks(run.name, self.run_folder(run) / "model", tried)

    def _attacks(self, name: str, model: Path, tried: tuple[str, ...]) -> Stage:
        recorded = self.records.has_attacks(name, self.plan.attacks)
        return Stage(f"attacks on {name}", (name,), tried, partial(self.attack, name, model), recorded)

    def _unlearned(self, run: Run, tries: list[dict[str, Any]], records: Records) -> bool:
        """With the settings that are chosen now: what was tried later may have changed them."""
        record = records.run(run.name)
        return record is not None and all(record[k] == v for k, v in choice.chosen(tries, run).items())

    def run_recorded(self, run: Run, tries: list[dict[str, Any]], records: Records) -> bool:
        """With its attacks."""
        attacked = not run.attacked or records.has_attacks(run.name, self.plan.attacks)
        return attacked and self._unlearned(run, tries, records)

    def models_recorded(self, records: Records) -> bool:
        """Those that are not unlearned, with the attacks on them."""
        names = ("base", *(taught.name for taught in self.plan.taught))
        return all(records.has_model(name) for name in names) and all(
            records.has_attacks(name, self.plan.attacks) for name in self.plan.controls
        )

    def run(self, collect: Callable[[], object]) -> None:
        """All stages that are missing, `collect` after each; those of other processes are waited for."""
        missing = self.missing
        done = {stage.name for stage in self.stages} - {stage.name for stage in missing}
        while left := [stage for stage in missing if stage.name not in done]:
            taken = next((stage for stage in left if self._taken(stage, done)), None)
            if taken is None:
                time.sleep(AGAIN)
                continue
            done.add(taken.name)
            collect()

    def _taken(self, stage: Stage, done: set[str]) -> bool:
        """Whether the stage could be run; it is done then."""
        if not done.issuperset((*stage.models, *stage.needs)):
            return False
        try:
            with self.alone(stage.name, wait=False):
                self.console.rule(f"{stage.name} ({len(done) + 1} of {len(self.stages)})")
                stage.run()
        except Timeout:
            return False
        return True

    def teach(self, taught: Taught) -> None:
        chosen = build(
            finetune.FinetuneOptions, model=str(self.base), template=TEMPLATE, out=self.work / taught.name,
            split=taught.split, seed=taught.seed, eval_steps=0, data_dir=str(self.folders["data"]),
            **self.plan.finetune,
        )  # fmt: skip
        finetune.main(*chosen)

    def evaluate(self, name: str, rows: str) -> None:
        template = TEMPLATE if name == "base" else "auto"
        options = evaluate.EvaluateOptions(model=self.model(name), template=template, out=self.log(name, rows).parent)
        evaluate.main(options, self.benchmark(rows))

    def try_out(self, tried: Tried) -> None:
        settings = {name: value for name, value in tried._asdict().items() if value is not None}
        self._unlearn(self.run_folder(tried), TUNE, settings)

    def unlearn(self, run: Run) -> None:
        settings = choice.chosen(self.tries(), run) | {"method": run.method, "seed": run.seed}
        settings |= {"epochs": run.epochs} if run.epochs else {}
        self._unlearn(self.run_folder(run), run.scenario, settings, save_model=run.attacked)

    def _unlearn(self, out: Path, scenario: str, settings: Mapping[str, Any], save_model: bool = False) -> None:
        rows, settings = TUNE if scenario == TUNE else "data", {**self.plan.unlearn[scenario], **settings}
        benchmark = self.benchmark(rows, PERCENTS.get(scenario, 10))
        steps = settings["epochs"] * -(-len(benchmark.rows("forget")) // settings["batch_size"])
        retrained = "retain50" if scenario == TUNE else retrained_on(scenario)
        evaluated = self.plan.evaluated(settings["method"], scenario)
        options, _ = build(
            unlearn.UnlearnOptions, model=str(self.model("full")), out=out, save_model=save_model,
            eval_steps=-(-steps // evaluated), save_steps=0, save_every_minutes=8.0,
            start_log=self.log("full", rows), retain_log=self.log(retrained, rows), **settings,
        )  # fmt: skip
        unlearn.main(options, benchmark)

    def tries(self) -> list[dict[str, Any]]:
        """The records of what was tried and is finished, here or according to the records."""
        found = []
        log = self.log("retain50", TUNE)
        retrained = json.loads(log.with_name("metrics.json").read_text()) if log.exists() else {}
        for tried in self.plan.tries:
            folder, recorded = self.run_folder(tried), self.records.tried(tried)
            if (folder / "config.json").exists():
                history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]
                found.append(choice.outcome(tried, history, retrained))
            elif recorded:
                found.append(recorded)
        return choice.marked(found)

    def attack(self, of: str, model: Path) -> None:
        """Weights rounded to few bits; fine-tuning on a part of the forget set, the same rows for every model."""
        benchmark, format = self.benchmark(), Format(load_tokenizer(model))
        lr = choice.relearning_lr(self.tries())
        weights = model_fingerprint(str(model))
        with progress() as display:
            for name in self.plan.attacks:
                log = self.attack_log(of, name)
                key = fingerprint([weights, benchmark.key(), name, RELEARNING, lr])
                if finished(log.with_name("attack.json"), key):
                    continue
                attacked = load_model(model, pick_device())
                if name in ROUNDED:
                    with rounded(attacked, name):
                        measured(benchmark, attacked, format, log, display)
                else:
                    examples = benchmark.encode(format, benchmark.rows("forget"))
                    relearned, others = split(examples, int(name.removeprefix("relearn")) / 100, seed=0)
                    config = TrainConfig(lr=lr, packing="off", **RELEARNING)
                    relearn_(attacked, relearned, others, format.pad_token_id, config, follow=False)
                    measured(benchmark, attacked, format, log, display)
                write_record(log.with_name("attack.json"), {"key": key, "lr": lr})
