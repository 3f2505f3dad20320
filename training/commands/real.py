"""Test the papers' claims on a pre-trained model, SmolLM2-135M, on a part of TOFU, and write a report.

    python -m training.real --data_dir path/to/tofu                 the whole study; takes long on a CPU
    python -m training.real --data_dir path/to/tofu --quick         the same stages on few rows
    python -m training.real --report_only                           rewrite REPORT.md from the records in --out

Fetches the model (`training.real_model`), fine-tunes it on 60 authors and on the retain authors among them, chooses
learning rates on a separate forget set, unlearns a tenth and a half of the authors with every method, attacks the
results, and measures the cost of a step. Models and checkpoints stay in --work; small records, REPORT.md and figures go
to --out. An interrupted study is resumed by the same command. Two processes with the same folders share the work.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from training.benchmarks.tofu import TOFU
from training.benchmarks.tofu.data import HUB
from training.benchmarks.tofu.log import EvalLog, write_log
from training.commands.options import command_line
from training.commands.real_stages import Study
from training.commands.session import device_name
from training.methods import METHODS
from training.model import pick_device
from training.pretrained import costs, report
from training.pretrained.models import cache_folder, real_model, record_of
from training.pretrained.plan import SIZES, Run, retrained_on
from training.pretrained.records import Records, answers, measure, rounded
from training.store import write_json
from training.versions import versions

PROG = "training.real"
SMOLLM2 = "smollm2-135m"
RESULTS = Path(__file__).parents[1] / "results" / "real"


@dataclass(frozen=True)
class RealOptions:
    """The study."""

    data_dir: Annotated[str, "folder of TOFU's JSON lines, or data set of the hub"] = HUB
    quick: Annotated[bool, "few authors, one epoch, two methods: a quick check, not a result"] = False
    work: Annotated[Path | None, "folder for models and checkpoints. None: in the cache"] = None
    out: Annotated[Path | None, "folder for records and report. None: training/results/real, or runs/real_quick"] = None
    costs: Annotated[bool, "also measure the cost of a step, after all runs"] = True
    report_only: Annotated[bool, "only write the report from the records in --out"] = False
    dry_run: Annotated[bool, "list the stages, and stop"] = False


def main(options: RealOptions) -> None:
    out = options.out or (Path("runs/real_quick") if options.quick else RESULTS)
    console = Console(stderr=True)
    if not options.report_only:
        size = "quick" if options.quick else "full"
        work = options.work or cache_folder().parent / f"real_{size}"
        study = Study(SIZES[size], cache_folder() / SMOLLM2, options.data_dir, work, out, console)
        if options.dry_run:
            print("\n".join(stage.name for stage in study.missing))
            return
        with study.alone("model"):
            study.base = real_model(SMOLLM2)
        study.records.check(study.plan, record_of(study.base)["weights_sha256"])
        command = f"python -m {PROG} --data_dir TOFU" + " --quick" * options.quick
        study.run(partial(collect, study, out, command))
        if options.costs:
            with study.alone("costs"):  # two at a time would measure each other
                measure_costs(study, out, console)
        with study.alone("records"):
            report.write(out)
    else:
        report.write(out)
    console.print(str(out / "REPORT.md"), soft_wrap=True)


def measure_costs(study: Study, out: Path, console: Console) -> None:
    """The cost of a step of every method on the study's rows, also for the model with a large vocabulary."""
    benchmark = study.benchmark()
    rows = {kind: benchmark.rows(kind) for kind in ("forget", "retain")}
    refusals = benchmark.refusals()
    idk = [row | {"answer": refusals[i % len(refusals)]} for i, row in enumerate(rows["forget"])]
    folders = {name: real_model(name) for name in {case.model for case in study.plan.costs}}
    name = device_name(pick_device())
    costs.measure(folders, rows | {"idk": idk}, out / "costs.json", console, cases=study.plan.costs, device_name=name)


def collect(study: Study, out: Path, command: str) -> None:
    """Write the records of all finished runs to `out`. Existing records are not changed."""
    with study.alone("records"):
        benchmark, base = study.benchmark(), record_of(study.base)
        config = {
            "size": rounded(json.loads(json.dumps(asdict(study.plan)))),
            "model": {"name": base["name"], "sha256": base["weights_sha256"], "parameters": base["parameters"]}
            | {name: base[name] for name in ("source", "licence")},
            "device": device_name(pick_device()),
            "versions": versions(),
            "command": command,
        }
        write_json(out / "config.json", config)
        records, tries = Records(out), study.tries()
        write_json(out / "choice.json", rounded(tries))
        if not study.models_recorded(records):
            write_json(out / "models.json", dict(_models(study, benchmark, records)))
        for run in study.plan.runs():
            record = None if study.run_recorded(run, tries, records) else _run(study, benchmark, run, records)
            if record:
                write_json(out / "runs" / f"{run.name}.json", record)


def _models(study: Study, benchmark: TOFU, records: Records) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluations of the models that are not unlearned. Forget quality compares with the model without forget10."""
    retrained = _read(study, benchmark, "retain90")
    for name in ("base", *(taught.name for taught in study.plan.taught)):
        log = _read(study, benchmark, name)
        if log:
            against = _read(study, benchmark, "retain50") if name.startswith("retain50") else retrained
            record = measure(benchmark, log, against) | {"answers": answers(benchmark, log)}
            yield name, record | {"attacks": _attacks(study, benchmark, name, retrained, records.models.get(name))}
            write_log(records.log(name), log)


def _run(study: Study, benchmark: TOFU, run: Run, records: Records) -> dict[str, Any] | None:
    """None if it is not finished here."""
    folder = study.run_folder(run)
    if not (folder / "config.json").exists():
        return None
    config, metrics = (json.loads((folder / name).read_text()) for name in ("config.json", "metrics.json"))
    settings, retrained = config["settings"], _read(study, benchmark, retrained_on(run.scenario))
    logs = [benchmark.read(folder / "eval" / f"step-{entry['step']:06d}.json") for entry in metrics["history"]]
    return {
        "scenario": run.scenario,
        **{name: settings[name] for name in ("method", "seed", "lr", "epochs", "beta", "forget_weight")},
        "retain_weight": settings["retain_weight"] if METHODS[run.method].retain else None,
        "steps": metrics["steps"],
        "start": study.start,
        "device": config["device"],
        "versions": config["versions"],
        "checkpoints": [
            rounded({name: entry[name] for name in ("step", "epoch")}) | measure(benchmark, log, retrained)
            for entry, log in zip(metrics["history"], logs, strict=True)
        ],
        "attacks": _attacks(study, benchmark, run.name, retrained, records.run(run.name)) if run.attacked else {},
        "answers": answers(benchmark, logs[-1]),
    }


def _attacks(
    study: Study, benchmark: TOFU, of: str, retrained: EvalLog | None, recorded: dict[str, Any] | None
) -> dict[str, Any]:
    """Those that are finished here, and those of the record of the model."""
    logs = {attack: study.attack_log(of, attack) for attack in study.plan.attacks}
    finished = {attack: log for attack, log in logs.items() if log.with_name("attack.json").exists()}
    found = {attack: measure(benchmark, benchmark.read(log), retrained) for attack, log in finished.items()}
    return (recorded or {}).get("attacks", {}) | found


def _read(study: Study, benchmark: TOFU, model: str) -> EvalLog | None:
    log = study.log(model)
    return benchmark.read(log) if log.exists() else None


if __name__ == "__main__":
    command_line(PROG, RealOptions, __doc__, main)
