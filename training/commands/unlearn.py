"""Unlearn a forget set with any method of the registry, without forming logits.

    python -m training.unlearn --model runs/full/model --method npo_rt --forget_percent 10 --out runs/npo_rt
    python -m training.unlearn --preset llama-3.2-1b --model runs/full/model --method npo_kl --out runs/npo_kl

The reference log-probabilities of --model are computed once and cached; --reference_cache shares them between runs.
Before the first step the NPO loss is checked to be (2/beta) ln 2. Methods without a reference skip both. UNDIAL caches
last hidden states instead. Only the KL methods and RMU keep the reference model in memory. --list prints all methods
with their sources and costs.

The benchmark evaluates the model before training, every --eval_steps, and after. Attacks may bring back what was
forgotten: --rounded int4,nf4 evaluates the model again with rounded weights (--saf_format trains against this), and
--relearn 0.2 after fine-tuning on a part of the forget set. --out gets model/ with a model card, adapter/ (LoRA), the
measures of every evaluation in eval/, metrics.json, config.json, report.md and figure.png. --report_to shows live
curves (docs/guides/logging.md). Ctrl-C and SIGTERM save a checkpoint; the same command resumes the run, which on a CPU
ends with the same bits as an uninterrupted one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.progress import Progress
from transformers import PreTrainedModel

from training import distributed
from training.alternates import read_alternates
from training.benchmarks import Benchmark
from training.commands.attack_options import AttackedOptions
from training.commands.method_options import MethodOptions, list_of_methods, resolved, settings_of
from training.commands.options import command_line
from training.commands.session import Session, SessionOptions, measured
from training.commands.told import tell_warnings
from training.config import TrainConfig
from training.data import Example, Row, data_hash
from training.dual import DualWeight
from training.layers import LayerTap
from training.loading import load_config
from training.methods import METHODS, Sizes, method_named, table
from training.model import merged
from training.observed import Observed
from training.progress import counted, progress
from training.quantization import linear_weights, rounded
from training.reference_cache import check_step_zero, found_or_computed
from training.relearning import relearn_, split
from training.reports.card import Card
from training.reports.run import write_unlearning_report
from training.run import run
from training.scoring import PerToken, Scores, score
from training.steps import Batches, plan_unlearning, scored_tokens
from training.store import DamagedError, check_json, fingerprint
from training.trainer import Trainer
from training.unlearning import Frozen, UnlearningSteps, cached_per_token, kept_head

PROG = "training.unlearn"
CHECKED = 16  # rows that a start log is compared with the model on
ROUNDING, PRECISION = 0.5, 0.01  # nats, and a share of the loss: what another precision or device may change


@dataclass(frozen=True)
class UnlearnOptions(AttackedOptions, MethodOptions, SessionOptions):
    """The method, and what is compared and kept."""

    stage: ClassVar[str] = "unlearn"
    method: Annotated[str, lambda: f"objective: {', '.join(METHODS)}"] = "npo_rt"
    list: Annotated[bool, "print the methods with their sources and costs, and stop"] = False
    alternates: Annotated[
        Path | None,
        "AltPO: JSON lines {question, alternates}, written by training.alternates. None: the benchmark's own",
    ] = None
    reference_cache: Annotated[Path | None, "folder of cached reference log-probabilities. None: --out/reference"] = (
        None
    )
    save_model: Annotated[bool, "save the unlearned model; --no_save_model keeps only the metrics"] = True
    start_log: Annotated[
        Path | None, "existing evaluation of --model, used instead of evaluating it before training"
    ] = None
    retain_log: Annotated[
        Path | None, "evaluation of a model trained without the forget set; needed for the forget quality"
    ] = None


class Unlearning:
    """One run of this command: its rows, its plan, its reference."""

    def __init__(self, options: UnlearnOptions, benchmark: Benchmark):
        self.method = method_named(options.method)
        self.settings = settings_of(self.method, options, options.seed)
        self.options = options = replace(options, method=self.method.name, **resolved(self.settings))
        self.session, self.benchmark = Session(PROG, options, benchmark), benchmark
        self.formats = options.check_attacks()
        forget, retain = benchmark.rows("forget"), benchmark.rows("retain")
        self.rows = {"forget": self.encode(forget), "retain": self.encode(retain)}
        self._check()
        if options.relearn and len(self.rows["forget"]) < 2:
            raise ValueError("--relearn: expected at least 2 examples of the forget set, got 1; leave the option out")
        kind, answers = self._other_answers(forget)  # several for each forget row, one of which is drawn every time
        most = max(map(len, answers), default=0)
        sizes = len(self.rows["forget"]), len(self.rows["retain"])
        self.plan = plan_unlearning(*sizes, most, options, options.compat == "npo-repo")
        if kind:
            drawn = ((forget[i]["question"], answers[i][j % len(answers[i])]) for i, j in self.plan.idk)
            self.rows[kind] = self.encode([{"question": question, "answer": answer} for question, answer in drawn])
        self.retain_log, self.start_log = (
            benchmark.read(path) if path else None for path in (options.retain_log, options.start_log)
        )
        if self.start_log:
            benchmark.check(self.start_log)

    def _check(self) -> None:
        """ValueError where the method cannot run on this model and these rows, before the model is loaded."""
        method, settings = self.method, self.settings
        config = load_config(self.session.model).get_text_config()
        longest = max(scored_tokens([row], [0]) for row in self.rows["forget"])
        if problem := method.check(settings, Sizes(config.vocab_size, config.num_hidden_layers, longest)):
            raise ValueError(problem)
        every = settings.published_rows and method.published_rows == "every"
        if every and self.session.packs(self.options.attn_implementation):
            raise ValueError("--published_rows: this method counts the padding of a batch; expected --packing off")
        if method.dual and method.retain and settings.dual_warmup_epochs >= self.options.epochs:
            self.session.say(
                f"{method.label}: the retain weight stays {settings.retain_weight:g}, as --dual_warmup_epochs "
                f"({settings.dual_warmup_epochs:g}) is no less than --epochs ({self.options.epochs})"
            )

    def _other_answers(self, forget: list[Row]) -> tuple[str, list[list[str]]]:
        """(kind of rows, answers to each of the forget rows), where the method takes any."""
        if {"idk", "alternate"}.intersection(self.method.needs) and not all("question" in row for row in forget):
            raise ValueError(
                f"--method {self.method.name} compares answers to questions, and {self.benchmark.title} forgets plain "
                "text; take a method without other answers (--list)"
            )
        if "idk" in self.method.needs:
            return "idk", [self.benchmark.refusals()] * len(forget)
        if "alternate" not in self.method.needs:
            return "", []
        path = self.options.alternates
        answers = self.benchmark.alternates() if path is None else read_alternates(path, forget)
        if not answers:
            raise ValueError(
                f"--method {self.method.name} needs other answers: expected --alternates, a file of "
                "python -m training.alternates"
            )
        return "alternate", answers

    def encode(self, rows: list[Row]) -> list[Example]:
        return self.benchmark.encode(self.session.format, rows)

    @cached_property
    def depends_on(self) -> list[str]:
        """Hashes of the rows, of what is evaluated, and of the logs that it is compared with."""
        paths = (self.options.retain_log, self.options.start_log)
        logs = [path and path.read_text(encoding="utf-8") for path in paths]
        return [data_hash(rows) for rows in self.rows.values()] + [self.benchmark.key(), fingerprint(logs)]

    def check_start_log(self, model: PreTrainedModel) -> None:
        """ValueError where the start log is of another model, whose numbers would stand for those before unlearning."""
        format = self.session.format
        examples, logged = self.benchmark.losses(self.start_log, format, CHECKED)
        given = [-value for value in score(model, examples, format.pad_token_id).logps.tolist()]
        off = [abs(a - b) - PRECISION * abs(b) for a, b in zip(given, logged, strict=True)]
        if not all(value <= ROUNDING for value in off):
            i = off.index(max(off))
            raise ValueError(
                f"--start_log: expected an evaluation of --model {self.session.model}; of forget row {i} it has a loss "
                f"of {logged[i]:.4g} nats, and the model gives {given[i]:.4g}: it is of another model, template or "
                "tokenizer; evaluate the model again, or leave the option out"
            )

    def references(self, model: PreTrainedModel, display: Progress) -> dict[str, Scores]:
        """What is cached of the model before the first step: of the forget rows, and of those it is compared with."""
        folder, method = self.options.reference_cache or self.session.out / "reference", self.method
        files, per_token = {}, self.per_token
        if method.reference or per_token:
            suffix = f"_{per_token}" if per_token else ""
            files["forget"] = f"{self.benchmark.scenario}{suffix}.safetensors"
            for kind in {"idk", "alternate"}.intersection(method.needs):  # which are drawn depends on the plan
                files[kind] = f"{kind}_{data_hash(self.rows[kind])[:12]}{suffix}.safetensors"
        packing = self.session.batches(model).packing
        return {
            kind: found_or_computed(
                folder / file,
                model,
                self.session.format,
                self.rows[kind],
                shared=self.options.reference_cache is not None,
                counted=lambda name, total: counted(display, name, total),
                say=self.session.say,
                packing=packing,
                per_token=per_token,
            )
            for kind, file in files.items()
        }

    @property
    def per_token(self) -> PerToken | None:
        return cached_per_token(self.method, self.settings)

    def steps(self, model: PreTrainedModel, batches: Batches, frozen: Frozen) -> UnlearningSteps:
        """With the frozen model, the taps and the dual weight that the method takes."""
        method, settings, tap = self.method, self.settings, None
        if method.needs_frozen_model(settings):
            frozen = replace(frozen, model=self.session.load_reference())
        if method.reads == "activations":
            alone = method.retain == "activations"  # all there is comes from this layer
            tap = LayerTap(model, settings.layer, "training" if alone else None)
            if alone:
                tap.freeze_above()
            if frozen.model is not None:
                frozen = replace(frozen, tap=LayerTap(frozen.model, settings.layer, "always" if alone else None))
        dual = None
        if method.dual and method.retain:
            dual = DualWeight(settings, len(self.plan.steps) // self.options.epochs, batches.device)
        observed = Observed() if self.session.tracking else None
        return UnlearningSteps(
            method, settings, self.plan, self.rows, frozen, self.options, batches, tap, dual, observed
        )

    def evaluate(
        self, model: PreTrainedModel, step: int, progress: Progress, dual: DualWeight | None = None
    ) -> dict[str, Any]:
        """The numbers after a step; the measures go to eval/."""
        if step == 0 and self.start_log:
            measures = self.start_log
            distributed.on_main(lambda: self.benchmark.write(self.measures(step), measures))
        else:
            measures = self.measured(model, self.measures(step), progress)
        summary = self.benchmark.summarize(measures, self.retain_log)
        if step == 0:
            tell_warnings(self.benchmark, measures, self.retain_log)
        weight = {} if dual is None else {"retain_weight": dual.weight}
        return {"epoch": step * self.options.epochs / len(self.plan.steps), **weight, **summary}

    def card(self, step_zero: Mapping[str, float] | None) -> Card:
        """Of the unlearned model, without its results. `step_zero`: of `check_step_zero`."""
        benchmark, method, parts = self.benchmark, self.method, []
        if method.reference or self.per_token:
            what = "last hidden states" if self.per_token == "hidden" else "log-probabilities"
            parts.append(f"Its {what} on {len(self.rows['forget'])} forget rows were computed once and cached.")
        if method.needs_frozen_model(self.settings):
            parts.append("It was kept in memory, frozen, and run in every step.")
        if step_zero is not None:
            parts.append(
                f"Before the first step the NPO loss against the cache was {step_zero['loss']:.6f}; expected: (2/beta) "
                f"ln 2 = {step_zero['expected_loss']:.6f}."
            )
        return self.session.card(
            f"with {benchmark.scenario} of {benchmark.title} unlearned by {method.label}",
            self.rows,
            method=method,
            reference=" ".join(["The reference model is the model before the first step.", *parts]) if parts else "",
            columns=benchmark.columns,
        )

    def attacks(self, model: PreTrainedModel, tap: LayerTap | None) -> dict[str, dict[str, Any]]:
        """{attack: the numbers after it}: weights rounded to each format, and relearning, which leaves the model so.

        Adapters are merged first, as in what is saved.
        """
        found: dict[str, dict[str, Any]] = {}
        if tap is not None:
            tap.remove()  # relearning takes all layers
        whole, _ = merged(model, {})
        with progress() as display:

            def measure(name: str) -> None:
                measures = self.measured(whole, self.session.out / "eval" / f"{name}.json", display)
                found[name] = self.benchmark.summarize(measures, self.retain_log)

            for format in self.formats:
                with rounded(whole, format):
                    measure(format)
            if o := self.options.relearn:
                relearned, others = split(self.rows["forget"], o, self.options.seed)
                relearn_(whole, relearned, others, self.session.format.pad_token_id, self.relearning, follow=False)
                measure("relearned")
        return found

    @property
    def relearning(self) -> TrainConfig:
        o = self.options
        return TrainConfig(
            o.relearn_epochs,
            o.lr if o.relearn_lr is None else o.relearn_lr,
            o.batch_size,
            o.micro_batch_size,
            o.gradient_accumulation_steps,
            packing="off",
            precision=o.precision,
            seed=o.seed,
        )

    def measured(self, model: PreTrainedModel, path: Path, progress: Progress) -> Any:
        """The measures of the model, which the file then has."""
        return measured(self.benchmark, model, self.session.format, path, progress)

    def measures(self, step: int) -> Path:
        return self.session.out / "eval" / f"step-{step:06d}.json"

    def check_measures(self) -> None:
        """ValueError where those of a run that goes on are damaged: the models that they are of are gone."""
        for path in sorted(self.measures(0).parent.glob("step-*.json")) if self.session.checkpoints.exist() else ():
            try:
                check_json(path)
            except DamagedError as damage:
                raise ValueError(f"{damage}; remove {self.session.out}, and the same command begins again") from None

    def samples(self, step: int) -> list[dict[str, str]]:
        return self.benchmark.samples(self.benchmark.read(self.measures(step)))


def main(options: UnlearnOptions, benchmark: Benchmark) -> dict[str, Any] | None:
    """metrics.json: {"history": [one entry an evaluation], "step_zero", "samples", ...}; None where nothing was run."""
    if options.list:
        print(list_of_methods())
        return None
    job = Unlearning(options, benchmark)
    session, options, method = job.session, job.options, job.method
    num_steps = len(job.plan.steps)
    if options.dry_run:
        frozen, copied = method.needs_frozen_model(job.settings), job.per_token == "hidden" and not options.lora_rank
        session.describe(num_steps, job.rows, together=method.kinds, with_reference=frozen, with_head_copy=copied)
        return None
    with session.folder.alone():
        return session.start(*job.depends_on) or _unlearned(job)


def _unlearned(job: Unlearning) -> dict[str, Any]:
    session, options, benchmark, method = job.session, job.options, job.benchmark, job.method
    num_steps = len(job.plan.steps)
    job.check_measures()
    model = session.load_model()
    session.check_lengths(model, [example for rows in job.rows.values() for example in rows])
    if job.formats:
        linear_weights(model)  # or there is nothing to round
    batches = session.batches(model)
    if job.start_log:
        job.check_start_log(model)
    step_zero = None
    with progress() as display:
        scores = job.references(model, display)
        model = session.to_train(model)
        head = kept_head(model) if job.per_token == "hidden" else None
        if method.reference:
            rows, refs = job.rows["forget"], scores["forget"].logps
            on_rows = counted(display, "Check of step 0", len(rows))
            step_zero = check_step_zero(model, rows, refs, batches, options.batch_size, job.settings.beta, on_rows)
    steps = job.steps(model, batches, Frozen(scores, head=head))
    trainer = Trainer(model, options, num_steps, steps.observed)
    if job.formats and trainer.sharded:
        raise ValueError("--rounded: expected one process, or DDP; or `training.evaluate --rounded` of the saved model")
    if options.relearn and distributed.count() > 1:
        raise ValueError("--relearn: expected one process; or `training.attack relearn` of the saved model")
    if steps.dual is not None:
        trainer.states["dual"] = steps.dual
    history = run(
        trainer,
        steps,
        session.schedule(num_steps),
        lambda step, progress: job.evaluate(model, step, progress, steps.dual),
        label=method.label,
        checkpoints=session.checkpoints,
        tracking=session.tracking,
    )
    weights, card = trainer.weights(), job.card(step_zero)
    results = {"before": history[0], "after": history[-1]}
    if options.save_model:
        session.save_model(model, weights, card, results)
    attacks = job.attacks(model, steps.tap) if job.formats or options.relearn else {}
    if options.save_model and attacks:
        session.update_card(card, results | {f"after, {attack}": summary for attack, summary in attacks.items()})
    metrics = {
        "method": method.label,
        "scenario": benchmark.scenario,
        "rows": {kind: len(rows) for kind, rows in job.rows.items()},
        "steps": num_steps,
        "step_zero": step_zero,
        "history": history,
        "attacks": attacks,
        "samples": {"before": job.samples(0), "after": job.samples(num_steps)},
    }
    distributed.on_main(lambda: write_unlearning_report(session.out, metrics, session.public(), benchmark))
    return session.finish(metrics)


if __name__ == "__main__":
    methods = "".join(f"    {names:<34}{formula}   ({paper})\n" for names, formula, paper in table())
    keeps = "_rt adds the NLL of the retain rows, _kl their KL divergence from the reference model; grad_diff is ga_rt."
    command_line(PROG, UnlearnOptions, f"{__doc__}\nThe methods; {keeps}\n\n{methods}", main)
