"""The stages of the study on a pre-trained model: each a run of another command, in a folder that finds what is done.

Several processes may work on one folder: each takes the first stage that no other one has and whose needs are there.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from transformers import AutoTokenizer

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.benchmark import TofuOptions
from training.commands import evaluate, finetune, unlearn
from training.commands.options import build
from training.commands.session import measured, model_fingerprint
from training.config import TrainConfig
from training.model import load_model, pick_device
from training.pretrained import choice, part
from training.pretrained.plan import PERCENTS, ROUNDED, Plan, Run, Taught, Tried, retrained_on
from training.progress import progress
from training.quantization import rounded
from training.relearning import relearn_, split
from training.store import fingerprint, finished, write_json
from training.templates import Format

TEMPLATE = "plain"  # a chat template puts twenty tokens of a system message before every question
AGAIN = 5.0  # seconds until a process looks again for a stage that it can take
TUNE = "tune"
RELEARNING: dict[str, Any] = {"epochs": 5, "batch_size": 8}


class Stage(NamedTuple):
    name: str
    needs: tuple[str, ...]
    run: Callable[[], object]


class Study:
    """The study of `plan`, from the model in the folder `base`, in the folder `work`."""

    def __init__(self, plan: Plan, base: Path, data_dir: str, work: Path, console: Console):
        self.plan, self.base, self.data_dir, self.work, self.console = plan, base, data_dir, work, console

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Of the rows that are reported, and of those of the choice."""
        with self.alone("rows"):
            return part.write(self.data_dir, self.plan.part, self.work)

    def alone(self, name: str, wait: bool = True) -> FileLock:
        """What one process at a time does: as a context. `Timeout` where it does not wait and another has it."""
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name.replace(' ', '_')}.lock", blocking=wait)

    # -- where things are ------------------------------------------------------------------------------------------

    def model(self, name: str) -> Path:
        return self.base if name == "base" else self.work / name / "model"

    def log(self, model: str, rows: str = "data") -> Path:
        return self.work / "evaluations" / f"{model}-{rows}" / evaluate.LOG_FILE

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
        """In the order in which they are taken up: retrained once more, for the noise, is between the two scenarios."""
        first, second = PERCENTS
        return [
            *self._models(seeds=(0,)),
            *self._tries(),
            *self._runs(first),
            *self._models(seeds=self.plan.seeds[1:]),
            *self._runs(second),
        ]

    def _models(self, seeds: Sequence[int]) -> Iterator[Stage]:
        """Fine-tuned, and evaluated on the rows that are reported; the first ones on those of the choice as well."""
        taught = [each for each in self.plan.taught if each.seed in seeds]
        for each in taught:
            yield Stage(each.name, (), partial(self.teach, each))
        tuned_on = [(name, TUNE) for name in ("full", "retain50") if 0 in seeds]
        for name, rows in [*tuned_on, *((each.name, "data") for each in taught)]:
            yield Stage(f"evaluation of {name} on {rows}", (name,), partial(self.evaluate, name, rows))
        if 0 in seeds:
            yield Stage("evaluation of base on data", (), partial(self.evaluate, "base", "data"))

    def _tries(self) -> Iterator[Stage]:
        needs = ("evaluation of full on tune", "evaluation of retain50 on tune")
        for tried in self.plan.tries:
            yield Stage(f"try {tried.name}", needs, partial(self.try_out, tried))

    def _runs(self, scenario: str) -> Iterator[Stage]:
        """With the attacks on what they leave, and on the models that these are compared with."""
        tried = tuple(f"try {tried.name}" for tried in self.plan.tries)
        logs = ("evaluation of full on data", f"evaluation of {retrained_on(scenario)} on data")
        attacked = {}
        for run in self.plan.runs():
            if run.scenario == scenario:
                yield Stage(run.name, (*tried, *logs), partial(self.unlearn, run))
                if run.attacked:
                    attacked[run.name] = self.run_folder(run) / "model"
        if attacked:
            attacked |= {name: self.model(name) for name in self.plan.controls}
        for name, model in attacked.items():
            yield Stage(f"attacks on {name}", (name, *tried), partial(self.attack, name, model))

    def run(self) -> None:
        """All stages; those of other processes are waited for."""
        done: set[str] = set()
        while len(done) < len(self.stages):
            taken = next((s for s in self.stages if s.name not in done and self._taken(s, done)), None)
            if taken is None:
                time.sleep(AGAIN)
            else:
                done.add(taken.name)

    def _taken(self, stage: Stage, done: set[str]) -> bool:
        """Whether the stage could be run; it is done then."""
        if not done.issuperset(stage.needs):
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
        self._unlearn(self.run_folder(run), run.scenario, settings, save_model=run.attacked)

    def _unlearn(self, out: Path, scenario: str, settings: Mapping[str, Any], save_model: bool = False) -> None:
        rows, plan = TUNE if scenario == TUNE else "data", self.plan
        benchmark = self.benchmark(rows, PERCENTS.get(scenario, 10))
        steps = plan.epochs[scenario] * -(-len(benchmark.rows("forget")) // int(plan.unlearn["batch_size"]))
        retrained = "retain50" if scenario == TUNE else retrained_on(scenario)
        options, _ = build(
            unlearn.UnlearnOptions, model=str(self.model("full")), out=out, epochs=plan.epochs[scenario],
            eval_steps=-(-steps // plan.evaluations[scenario]), save_steps=0, save_every_minutes=8.0,
            save_model=save_model,
            start_log=self.log("full", rows), retain_log=self.log(retrained, rows), **plan.unlearn, **settings,
        )  # fmt: skip
        unlearn.main(options, benchmark)

    def tries(self) -> list[dict[str, Any]]:
        """The records of what was tried and is finished."""
        found = []
        log = self.log("retain50", TUNE)
        retrained = json.loads(log.with_name("metrics.json").read_text()) if log.exists() else {}
        for tried in self.plan.tries:
            folder = self.run_folder(tried)
            if (folder / "config.json").exists():
                history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"]
                found.append(choice.outcome(tried, history, retrained))
        return choice.marked(found)

    def attack(self, of: str, model: Path) -> None:
        """Weights rounded to few bits; fine-tuning on a part of the forget set, the same rows for every model."""
        benchmark, format = self.benchmark(), Format(AutoTokenizer.from_pretrained(model))
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
                write_json(log.with_name("attack.json"), {"key": key, "lr": lr})
