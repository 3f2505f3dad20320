"""Unlearn a forget set: any method of the papers, on answer tokens alone, without logits and without a second model.

    python -m training.unlearn --model runs/full/model --method npo_rt --forget_percent 10 --out runs/npo_rt
    python -m training.unlearn --preset llama-3.2-1b --model runs/full/model --method npo_kl --out runs/npo_kl

The reference log-probabilities of --model are computed once and cached (--reference_cache shares them between runs);
before the first step the NPO loss is checked to be (2/beta) ln 2 (methods without a reference need neither). Only the
KL methods keep the reference model itself.
The model is evaluated on TOFU's four sets before, every --eval_steps and after. --out gets model/, adapter/ (LoRA),
eval/ (a log in the published layout for every evaluation), metrics.json, config.json, report.md and figure.png. Ctrl-C
saves; the same command goes on where it was, and ends with the bits of a run that was not interrupted (on a CPU).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import fused_npo_loss
from training import processes
from training.command import Command, CommonOptions, command_line
from training.data import Example, data_hash, load_refusals, load_rows
from training.eval_log import EvalLog, read_log, write_log
from training.eval_sets import EvalRow, load_eval_sets
from training.evaluate_model import evaluate_model
from training.methods import METHODS, Compat, Positions, Settings
from training.model import autocast, load_model
from training.reference_cache import StaleReferenceError, compute_reference, load_reference
from training.require import require
from training.run import run
from training.scoring import Scores
from training.stages import fingerprint
from training.steps import Batches, Recipe, UnlearningSteps, plan_unlearning
from training.summary import summary
from training.templates import Format
from training.trainer import Metrics, Trainer
from training.unlearning_report import write_unlearning_report

PROG = "training.unlearn"
# How far the policy may be from the reference before the first step, in nats of a sequence's log-probability.
STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
NUM_SAMPLES = 3  # questions of each set whose answers a report shows


@dataclass(frozen=True)
class UnlearnOptions(CommonOptions):
    method: Annotated[str, "objective: what forgets, _rt or _kl: what keeps", tuple(METHODS)] = "npo_rt"
    forget_percent: Annotated[int, "forget set: 1, 5, 10, 20, 30, 50 or 90 (% of the authors)"] = 10
    beta: Annotated[float | None, "inverse temperature; default: the method's (training/methods.py)"] = None
    gamma: Annotated[float, "SimNPO's margin"] = 0.0
    forget_weight: Annotated[float | None, "of the term on the forget rows; default: the method's"] = None
    retain_weight: Annotated[float, "of the term on the retain rows"] = 1.0
    kl_positions: Annotated[
        Positions | None, "where a KL term compares the models; default: answer, all with npo-repo"
    ] = None
    compat: Annotated[Compat, "npo-repo: the NPO paper's code where it differs from the paper"] = "paper"
    reference_cache: Annotated[Path | None, "folder of cached reference log-probabilities; default: in --out"] = None
    save_model: Annotated[bool, "--no-save_model: the figures are all that is wanted, as in a grid"] = True
    start_log: Annotated[Path | None, "evaluation log of --model itself, to take instead of evaluating it again"] = None
    retain_log: Annotated[
        Path | None, "evaluation log of the model that never saw the forget set: for forget quality"
    ] = None
    eval_rows: Annotated[int, "first rows of every evaluation set; 0: all"] = 300
    eval_batch_size: Annotated[int, "sequences a forward or generation in evaluation"] = 32
    max_new_tokens: Annotated[int, "longest greedy answer"] = 200


def unlearn(model: PreTrainedModel, steps: UnlearningSteps, on_epoch: Callable[[int, float], None]) -> None:
    """Train in place; `on_epoch(epoch, mean loss)` after each epoch over the forget set."""
    losses: list[float] = []
    steps_per_epoch = len(steps) // steps.recipe.epochs

    def after_step(metrics: Metrics) -> None:
        losses.append(metrics.loss)
        if metrics.step % steps_per_epoch == 0:
            on_epoch(metrics.step // steps_per_epoch, sum(losses) / len(losses))
            losses.clear()

    Trainer(model, steps.recipe, len(steps)).train(steps, after_step=after_step)


def unlearning_steps(
    method: str,
    settings: Settings,
    recipe: Recipe,
    batches: Batches,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    ref_logps: Tensor,  # (len(forget),) float32
) -> UnlearningSteps:
    """The steps of a method that takes forget and retain rows, and no more."""
    chosen = METHODS[method]
    if chosen.idk or chosen.keep == "kl":
        raise ValueError(f"{method} takes refusals or the reference model: run python -m {PROG}")
    plan = plan_unlearning(len(forget), len(retain), 0, recipe, settings.compat == "npo-repo")
    rows = {"forget": forget, "retain": retain}
    return UnlearningSteps(chosen, settings, plan, rows, {"forget": ref_logps}, recipe, batches)


@torch.no_grad()
def check_step_zero(
    model: PreTrainedModel,
    forget: Sequence[Example],
    ref_logps: Tensor,
    batches: Batches,
    *,
    batch_size: int,
    beta: float,
) -> dict[str, float]:
    """With the policy equal to the reference every log-ratio is 0 and the NPO loss is (2/beta) ln 2: assert it.

    Batches are shuffled, unlike those of the cache, so rows that lost their reference would show.
    """
    device, expected = batches.device, 2 / beta * math.log(2)
    tolerance = STEP_ZERO_TOLERANCE["bfloat16" if device.type == "cuda" else "float32"]
    order = torch.randperm(len(forget), generator=torch.Generator().manual_seed(0)).tolist()
    was_training, largest, summed = model.training, 0.0, 0.0
    model.eval()
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        refs = ref_logps[members].to(device)
        npo = partial(fused_npo_loss, ref_logps=refs, beta=beta, reduction="sum", return_stats=True)
        with autocast(device):
            out = model(**batches([forget[i] for i in members]), fused_unlearning=npo)
        largest = max(largest, out.stats.log_ratio.abs().max().item())
        summed += out.loss.item()
    model.train(was_training)
    loss = summed / len(forget)
    if not (largest < tolerance and abs(loss - expected) < tolerance):
        raise ValueError(
            f"before the first step the NPO loss is {loss:.6f} and the largest log-ratio {largest:.2e}; expected "
            f"(2/beta) ln 2 = {expected:.6f} and 0 within {tolerance:g}: the model does not give what the reference "
            "cache says; the reference log-probabilities belong to other rows, or to other arithmetic"
        )
    return {"loss": loss, "expected_loss": expected, "max_abs_log_ratio": largest}


class Unlearning:
    """A run of this command, resolved: its rows, its plan, its evaluation sets."""

    def __init__(self, options: UnlearnOptions):
        self.method = METHODS[options.method]
        given = {name: value for name, value in asdict(options).items() if value is not None}
        positions = "all" if options.compat == "npo-repo" else "answer"
        published: dict[str, Any] = {
            "beta": self.method.beta,
            "forget_weight": self.method.forget_weight,
            "kl_positions": positions,
        }
        options = replace(options, **published | given)
        self.command = Command(PROG, "unlearn", options)
        self.options, recipe = self.command.options, self.command.recipe
        options = self.options
        self.settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
        forget, retain = (f"{kind}{percent:02d}" for kind, percent in
                          (("forget", options.forget_percent), ("retain", 100 - options.forget_percent)))  # fmt: skip
        questions = load_rows(options.data_dir, forget)
        refusals = load_refusals(options.data_dir) if self.method.idk else []
        self.rows = {
            "forget": self.format.encode(questions),
            "retain": self.format.encode(load_rows(options.data_dir, retain)),
        }
        fixed = self.settings.compat == "npo-repo"
        self.plan = plan_unlearning(len(questions), len(self.rows["retain"]), len(refusals), recipe, fixed)
        if self.method.idk:
            idk = [{"question": questions[i]["question"], "answer": refusals[j]} for i, j in self.plan.idk]
            self.rows["idk"] = self.format.encode(idk)
        self.sets = load_eval_sets(options.data_dir, options.forget_percent, options.eval_rows)
        self.retain_log = read_log(options.retain_log) if options.retain_log else None
        self.start_log = read_log(options.start_log) if options.start_log else None
        if self.start_log:
            _check_same_answers(self.start_log, self.sets)

    @property
    def format(self) -> Format:
        return self.command.format

    def depends_on(self) -> list[str]:
        """Hashes of the rows, of the evaluation sets, and of the logs that it is compared with."""
        sets = {name: [asdict(row) for row in rows] for name, rows in self.sets.items()}
        logs = [asdict(log) | {"name": None} for log in (self.retain_log, self.start_log) if log]
        return [data_hash(rows) for rows in self.rows.values()] + [fingerprint(sets), fingerprint(logs)]

    def references(self, model: PreTrainedModel) -> dict[str, Scores]:
        """The cached log-probabilities that the method compares with: of the forget rows, and of the IDK rows."""
        folder = self.options.reference_cache or self.command.out / "reference"
        files = {}
        if self.method.reference:
            files["forget"] = f"forget{self.options.forget_percent:02d}.safetensors"
            if self.method.idk:  # which refusals are drawn depends on the plan
                files["idk"] = f"idk_{data_hash(self.rows['idk'])[:12]}.safetensors"
        scores, packing = {}, self.command.recipe.packing
        for kind, file in files.items():
            cached = load_reference if (folder / file).exists() else compute_reference
            try:
                scores[kind] = cached(folder / file, model, self.format, self.rows[kind], packing=packing)
            except StaleReferenceError as reason:
                if self.options.reference_cache is not None:
                    raise
                self.command.say(f"computing the reference log-probabilities again: {reason}")
                scores[kind] = compute_reference(folder / file, model, self.format, self.rows[kind], packing=packing)
        return scores

    def evaluate(self, model: PreTrainedModel, step: int) -> dict[str, Any]:
        """The metrics after a step; its log goes to eval/."""
        name, sizes = f"step-{step:06d}", (self.options.eval_batch_size, self.options.max_new_tokens)
        if step == 0 and self.start_log:
            log = self.start_log
        else:
            log = evaluate_model(model, self.format, self.sets, name=name, batch_size=sizes[0], max_new_tokens=sizes[1])
        processes.on_main(lambda: write_log(self.command.out / "eval" / f"{name}.json", log))
        return {"epoch": step * self.command.recipe.epochs / len(self.plan.steps), **summary(log, self.retain_log)}

    def samples(self, log: EvalLog) -> list[dict[str, str]]:
        """Questions, true answers and generations, the first few of the forget and of the retain set."""
        return [
            {"set": name, "question": row.question, "answer": row.answer, "generation": text}
            for name in ("forget", "retain")
            for row, text in list(zip(self.sets[name], _generations(log, name), strict=True))[:NUM_SAMPLES]
        ]


def _generations(log: EvalLog, name: str) -> list[str]:
    return require(log.sets[name].texts("generation"), f"a log with texts, {log.name}")


def _check_same_answers(log: EvalLog, sets: dict[str, list[EvalRow]]) -> None:
    for name, rows in sets.items():
        answers = log.sets[name].texts("answer")
        if answers != [row.answer for row in rows]:
            came = "without texts" if answers is None else f"with {len(answers)} answers"
            raise ValueError(
                f"--start_log: expected a log of the {len(rows)} rows that are evaluated, got one {came} that are not "
                f"theirs ({name}); evaluate the model with the same --data_dir, --forget_percent and number of rows"
            )


def main(options: UnlearnOptions) -> dict[str, Any] | None:
    """metrics.json: {"history": [one entry an evaluation], "step_zero", "samples", ...}; None after --dry_run."""
    job = Unlearning(options)
    command, options, recipe = job.command, job.options, job.command.recipe
    num_steps = len(job.plan.steps)
    if options.dry_run:
        rows = {kind: len(rows) for kind, rows in job.rows.items()}
        command.describe(num_steps, {"rows": rows}, with_reference=job.method.keep == "kl")
        return None
    found = command.start(*job.depends_on())
    if found is not None:
        return found
    model = command.load_model()
    batches = command.batches(model)
    ref_logps = {kind: scores.logps for kind, scores in job.references(model).items()}
    model = command.to_train(model)
    step_zero = reference = None
    if job.method.reference:
        step_zero = check_step_zero(
            model,
            job.rows["forget"],
            ref_logps["forget"],
            batches,
            batch_size=recipe.batch_size,
            beta=job.settings.beta,
        )
    if job.method.keep == "kl":
        dtype = torch.bfloat16 if command.device.type == "cuda" else torch.float32
        reference = load_model(
            command.model, command.device, dtype=dtype, attn_implementation=options.attn_implementation
        ).eval()
    steps = UnlearningSteps(job.method, job.settings, job.plan, job.rows, ref_logps, recipe, batches, reference)
    trainer = Trainer(model, recipe, num_steps, options.report_to, command.out)
    history = run(
        trainer,
        steps,
        command.schedule(num_steps),
        lambda step: job.evaluate(model, step),
        label=job.method.label,
        checkpoints=command.checkpoints,
    )
    weights = trainer.weights()
    if options.save_model:
        what = f"unlearned forget{options.forget_percent:02d} of TOFU by {job.method.label}"
        command.save_model(model, weights, what)
    logs = {name: read_log(command.out / "eval" / f"step-{step:06d}.json")
            for name, step in (("before", 0), ("after", num_steps))}  # fmt: skip
    metrics = {
        "method": job.method.label,
        "forget_percent": options.forget_percent,
        "rows": {kind: len(rows) for kind, rows in job.rows.items()},
        "steps": num_steps,
        "step_zero": step_zero,
        "history": history,
        "samples": {name: job.samples(log) for name, log in logs.items()},
    }
    processes.on_main(lambda: write_unlearning_report(command.out, metrics, command.public()))
    return command.finish(metrics)


if __name__ == "__main__":
    command_line(PROG, UnlearnOptions, __doc__, main)
