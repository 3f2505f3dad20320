"""Unlearn a forget set by any method of the registry, without logits and without a second model.

    python -m training.unlearn --model runs/full/model --method npo_rt --forget_percent 10 --out runs/npo_rt
    python -m training.unlearn --preset llama-3.2-1b --model runs/full/model --method npo_kl --out runs/npo_kl

The reference log-probabilities of --model are computed once and cached (--reference_cache shares them between runs);
before the first step the NPO loss is checked to be (2/beta) ln 2 (methods without a reference need neither). Only the
KL methods keep the reference model itself.

The model is evaluated by the benchmark before, every --eval_steps and after, and with --rounded int4,nf4 once more with
its weights rounded, which may bring back what was forgotten; --saf_format trains against it. --out gets model/,
adapter/ (LoRA), the measures of every evaluation in eval/, metrics.json, config.json, report.md and figure.png. Ctrl-C
saves; the same command goes on where it was, and ends with the bits of a run that was not interrupted (on a CPU).
"""

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.progress import Progress
from transformers import PreTrainedModel

from training import distributed
from training.benchmarks import Benchmark
from training.commands.options import command_line
from training.commands.session import Session, SessionOptions
from training.data import Example, data_hash
from training.methods import METHODS, Settings, method_named, table
from training.methods.base import Compat, Positions
from training.model import merged
from training.progress import counted, progress
from training.quantization import FORMATS, formats_named, rounded
from training.reference_cache import StaleReferenceError, check_step_zero, compute_reference, load_reference
from training.reports.run import write_unlearning_report
from training.run import run
from training.scoring import Scores
from training.steps import UnlearningSteps, plan_unlearning
from training.store import fingerprint
from training.trainer import Trainer

PROG = "training.unlearn"
Rounded = Annotated[
    str, f"formats of {', '.join(FORMATS)}, with commas: evaluate once more at the end, with weights rounded to each"
]


@dataclass(frozen=True)
class MethodOptions:
    """Constants of the methods."""

    beta: Annotated[float | None, "inverse temperature. None: the method's own"] = None
    gamma: Annotated[float | None, "SimNPO's margin. None: the method's own"] = None
    forget_weight: Annotated[float | None, "of the term on the forget rows. None: the method's own"] = None
    retain_weight: Annotated[float | None, "of the term on the retain rows. None: the method's own"] = None
    kl_positions: Annotated[
        Positions | None, "where a KL term compares the models. None: answer, or all with npo-repo"
    ] = None
    compat: Annotated[Compat, "npo-repo: the NPO paper's code where it differs from the paper"] = "paper"


@dataclass(frozen=True)
class UnlearnOptions(MethodOptions, SessionOptions):
    """What forgets, and what is compared and kept."""

    stage: ClassVar[str] = "unlearn"
    method: Annotated[str, lambda: f"objective: {', '.join(METHODS)}"] = "npo_rt"
    reference_cache: Annotated[Path | None, "folder of cached reference log-probabilities. None: in --out"] = None
    rounded: Rounded = ""
    save_model: Annotated[bool, "no: the figures are all that is wanted, as in a grid"] = True
    start_log: Annotated[Path | None, "evaluation of --model itself, to take instead of evaluating it again"] = None
    retain_log: Annotated[Path | None, "evaluation of the model that never saw the forget set: for forget quality"] = (
        None
    )


class Unlearning:
    """A run of this command, resolved: its rows, its plan, its reference."""

    def __init__(self, options: UnlearnOptions, benchmark: Benchmark):
        self.method = method_named(options.method)
        positions = options.kl_positions or ("all" if options.compat == "npo-repo" else "answer")
        given = {f.name: getattr(options, f.name) for f in fields(Settings)} | {"kl_positions": positions}
        self.settings = self.method.settings(**given)
        self.options = options = replace(options, method=self.method.name, **asdict(self.settings))
        self.session, self.benchmark = Session(PROG, options, benchmark), benchmark
        self.formats = formats_named(options.rounded)
        forget, retain = benchmark.rows("forget"), benchmark.rows("retain")
        refusals = benchmark.refusals() if "idk" in self.method.needs else []
        self.rows = {"forget": self.encode(forget), "retain": self.encode(retain)}
        self.plan = plan_unlearning(len(forget), len(retain), len(refusals), options, options.compat == "npo-repo")
        if refusals:
            idk = [{"question": forget[i]["question"], "answer": refusals[j]} for i, j in self.plan.idk]
            self.rows["idk"] = self.encode(idk)
        self.retain_log, self.start_log = (
            benchmark.read(path) if path else None for path in (options.retain_log, options.start_log)
        )
        if self.start_log:
            benchmark.check(self.start_log)

    def encode(self, rows: list[dict]) -> list[Example]:
        return self.benchmark.encode(self.session.format, rows)

    @cached_property
    def depends_on(self) -> list[str]:
        """Hashes of the rows, of what is evaluated, and of the logs that it is compared with."""
        paths = (self.options.retain_log, self.options.start_log)
        logs = [path and path.read_text(encoding="utf-8") for path in paths]
        return [data_hash(rows) for rows in self.rows.values()] + [self.benchmark.key(), fingerprint(logs)]

    def references(self, model: PreTrainedModel, display: Progress) -> dict[str, Scores]:
        """The cached log-probabilities that the method compares with: of the forget rows, and of the IDK rows."""
        folder = self.options.reference_cache or self.session.out / "reference"
        files = {}
        if self.method.reference:
            files["forget"] = f"{self.benchmark.scenario}.safetensors"
            if "idk" in self.method.needs:  # which refusals are drawn depends on the plan
                files["idk"] = f"idk_{data_hash(self.rows['idk'])[:12]}.safetensors"
        format, packing = self.session.format, self.session.batches(model).packing

        def computed(path: Path, rows: list[Example]) -> Scores:
            on_rows = counted(display, f"Reference, {path.stem}", len(rows))
            return compute_reference(path, model, format, rows, packing=packing, on_rows=on_rows)

        scores = {}
        for kind, file in files.items():
            path, rows = folder / file, self.rows[kind]
            try:
                found = load_reference(path, model, format, rows, packing=packing) if path.exists() else None
            except StaleReferenceError as reason:
                if self.options.reference_cache is not None:
                    raise
                self.session.say(f"computing the reference log-probabilities again: {reason}")
                found = None
            scores[kind] = found or computed(path, rows)
        return scores

    def evaluate(self, model: PreTrainedModel, step: int, progress: Progress) -> dict[str, Any]:
        """The numbers after a step; the measures go to eval/."""
        name = f"step-{step:06d}"
        given = self.start_log if step == 0 else None
        measures = given or self.benchmark.evaluate(model, self.session.format, name, progress)
        distributed.on_main(lambda: self.benchmark.write(self.measures(step), measures))
        summary = self.benchmark.summarize(measures, self.retain_log)
        return {"epoch": step * self.options.epochs / len(self.plan.steps), **summary}

    def evaluate_rounded(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """{format: the numbers with weights rounded to it}. Adapters are merged first, as in what is saved."""
        found, (whole, _) = {}, merged(model, {})
        with progress() as display:
            for format in self.formats:
                with rounded(whole, format):
                    measures = self.benchmark.evaluate(whole, self.session.format, format, display)
                path = self.session.out / "eval" / f"{format}.json"
                distributed.on_main(partial(self.benchmark.write, path, measures))
                found[format] = self.benchmark.summarize(measures, self.retain_log)
        return found

    def measures(self, step: int) -> Path:
        return self.session.out / "eval" / f"step-{step:06d}.json"

    def samples(self, step: int) -> list[dict[str, str]]:
        return self.benchmark.samples(self.benchmark.read(self.measures(step)))


def main(options: UnlearnOptions, benchmark: Benchmark) -> dict[str, Any] | None:
    """metrics.json: {"history": [one entry an evaluation], "step_zero", "samples", ...}; None after --dry_run."""
    job = Unlearning(options, benchmark)
    session, options, method = job.session, job.options, job.method
    num_steps, with_kl = len(job.plan.steps), method.retain == "kl"
    if options.dry_run:
        session.describe(num_steps, job.rows, together=method.kinds, with_reference=with_kl)
        return None
    found = session.start(*job.depends_on)
    if found is not None:
        return found
    model = session.load_model()
    batches = session.batches(model)
    step_zero = None
    with progress() as display:
        ref_logps = {kind: scores.logps for kind, scores in job.references(model, display).items()}
        model = session.to_train(model)
        if "forget" in ref_logps:
            rows, refs = job.rows["forget"], ref_logps["forget"]
            on_rows = counted(display, "Check of step 0", len(rows))
            step_zero = check_step_zero(model, rows, refs, batches, options.batch_size, job.settings.beta, on_rows)
    reference = session.load_reference() if with_kl else None
    steps = UnlearningSteps(method, job.settings, job.plan, job.rows, ref_logps, options, batches, reference)
    trainer = Trainer(model, options, num_steps, options.report_to, session.out)
    if job.formats and trainer.sharded:
        raise ValueError("--rounded: expected one process, or DDP; or `training.evaluate --rounded` of the saved model")
    history = run(
        trainer,
        steps,
        session.schedule(num_steps),
        lambda step, progress: job.evaluate(model, step, progress),
        label=method.label,
        checkpoints=session.checkpoints,
    )
    weights = trainer.weights()
    if options.save_model:
        session.save_model(model, weights, f"unlearned {benchmark.scenario} of {benchmark.title} by {method.label}")
    metrics = {
        "method": method.label,
        "scenario": benchmark.scenario,
        "rows": {kind: len(rows) for kind, rows in job.rows.items()},
        "steps": num_steps,
        "step_zero": step_zero,
        "history": history,
        "rounded": job.evaluate_rounded(model) if job.formats else {},
        "samples": {"before": job.samples(0), "after": job.samples(num_steps)},
    }
    distributed.on_main(lambda: write_unlearning_report(session.out, metrics, session.public(), benchmark))
    return session.finish(metrics)


if __name__ == "__main__":
    methods = "".join(f"    {names:<34}{formula}   ({paper})\n" for names, formula, paper in table())
    keeps = "_rt adds the NLL of the retain rows, _kl their KL divergence from the reference model; grad_diff is ga_rt."
    command_line(PROG, UnlearnOptions, f"{__doc__}\nThe methods; {keeps}\n\n{methods}", main)
