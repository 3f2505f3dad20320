"""A training run with checkpoints, resumption, periodic evaluation, progress and trackers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from training import distributed, memory
from training.checkpoints import Checkpoints
from training.interruption import Interrupted, interruptible
from training.progress import progress
from training.random_states import kept
from training.tracking import Tracking, evaluation_names
from training.trainer import Job, Metrics, Trainer

Evaluate = Callable[[int, Progress], dict[str, Any]]  # (number of steps done, display) -> numbers for the history


@dataclass(frozen=True)
class Schedule:
    """When to evaluate and save. The last step is always evaluated."""

    num_steps: int
    evaluate_every: int  # steps; 0: only before the first step and after the last
    save_every: int  # steps; 0: not by steps
    save_every_minutes: float = 0.0  # 0: not by time

    def evaluates(self, step: int) -> bool:
        return step == self.num_steps or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int, minutes: float) -> bool:
        """`minutes`: since the last checkpoint. The last step is saved at the end of training."""
        by_steps = self.save_every > 0 and step % self.save_every == 0
        by_time = self.save_every_minutes > 0 and minutes >= self.save_every_minutes
        return step < self.num_steps and (by_steps or by_time)

    @property
    def saves_at_all(self) -> bool:
        return self.save_every > 0 or self.save_every_minutes > 0


def run(
    trainer: Trainer,
    job: Job,
    schedule: Schedule,
    evaluate: Evaluate,
    *,
    label: str,
    checkpoints: Checkpoints | None = None,
    tracking: Tracking | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train to the end, from the newest checkpoint if there is one. The history: an entry for each evaluation.

    An entry is {"step", "train_loss": the mean over the steps since the entry before, **evaluate(step)}. Random draws
    of an evaluation do not affect training.

    Raises:
        Interrupted: a signal arrived. The steps done are saved; an interrupted evaluation is repeated on resumption.
    """
    console = console or Console(stderr=True)
    with interruptible(), progress(console) as display:
        first, record, notes = checkpoints.load(trainer) if checkpoints else (0, None, [])
        if distributed.is_main():
            for note in notes:
                console.print(note, markup=False, soft_wrap=True)
            if record is not None:
                console.print(f"{label}: resuming after step {first} of {len(job)}")
        running = _Run(trainer, job, schedule, evaluate, label, checkpoints, tracking, display, first, record)
        failed = True
        try:
            if tracking:
                tracking.start(first)
            running.train()
            failed = False
        except Interrupted as stopped:
            if checkpoints and running.done > running.saved:
                running.save()
            raise Interrupted(stopped.number, running.done if running.started else None) from None
        finally:
            if tracking:
                tracking.finish(failed)
    return running.history


class _Run:
    """The state of a run: steps done, steps saved, history."""

    def __init__(
        self,
        trainer: Trainer,
        job: Job,
        schedule: Schedule,
        evaluate: Evaluate,
        label: str,
        checkpoints: Checkpoints | None,
        tracking: Tracking | None,
        display: Progress,
        first: int,
        record: dict[str, Any] | None,
    ):
        self.trainer, self.job, self.schedule, self.checkpoints = trainer, job, schedule, checkpoints
        self.evaluate, self.display, self.label, self.tracking = evaluate, display, label, tracking
        record = record or {"history": [], "losses": []}
        self.history: list[dict[str, Any]] = record["history"]
        self.losses: list[float] = record["losses"]
        self.first = self.done = self.saved = first
        self.saved_at = self.begun_at = self.step_at = time.monotonic()
        self.num_tokens, self.note = 0, ""

    @property
    def started(self) -> bool:
        """Whether there is anything to resume."""
        return self.checkpoints is not None and bool(self.history)

    def train(self) -> None:
        if not self.history or (self.schedule.evaluates(self.done) and self.history[-1]["step"] < self.done):
            self._evaluate()  # the first one, or one that was interrupted
        self.task = self.display.add_task(self.label, total=len(self.job), completed=self.first, unit="steps", note="")
        self.begun_at = self.step_at = time.monotonic()
        self.trainer.train(self.job, first_step=self.first, after_step=self._after_step, after_pass=self._after_pass)
        if self.schedule.saves_at_all and self.done > self.saved:
            self.save()  # later stages, such as attacks, may be interrupted too

    def save(self) -> None:
        if self.checkpoints:
            self.checkpoints.save(self.trainer, self.done, {"history": self.history, "losses": self.losses})
        self.saved, self.saved_at = self.done, time.monotonic()

    def _evaluate(self) -> None:
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        paused = time.monotonic()
        with kept(self.trainer.device):
            values = self.evaluate(self.done, self.display)
        self.history.append({"step": self.done, "train_loss": mean, **values})
        self.losses.clear()
        if self.tracking and (numbers := evaluation_names(values)):
            self.tracking.log(numbers, self.done)
        self.begun_at += time.monotonic() - paused  # the rate excludes evaluation

    def _after_pass(self, count: int) -> None:
        self.num_tokens += count * distributed.count()
        rate = self.num_tokens / (time.monotonic() - self.begun_at)
        self.display.update(self.task, note=f"{self.note}{rate:.0f} tokens/s")

    def _after_step(self, metrics: Metrics) -> None:
        self.done = metrics.step
        self.losses.append(metrics.loss)
        self.note = f"loss {metrics.loss:.3f}, "
        self.display.update(self.task, advance=1)
        if self.tracking:  # before an evaluation, which may be interrupted
            self.tracking.log(self._curves(metrics), metrics.step)
        if self.schedule.evaluates(metrics.step):
            self._evaluate()
        if distributed.any_of(self.schedule.saves(metrics.step, (time.monotonic() - self.saved_at) / 60)):
            self.save()
        self.step_at = time.monotonic()

    def _curves(self, metrics: Metrics) -> dict[str, float]:
        """The numbers of a step by their names in a tracker (docs/guides/logging.md)."""
        seconds, tokens = time.monotonic() - self.step_at, metrics.num_tokens * distributed.count()
        observed = self.trainer.observed.take() if self.trainer.observed else {}
        return {
            "loss/total": metrics.loss,
            **observed,
            "train/learning_rate": metrics.lr,
            "train/grad_norm": metrics.grad_norm,
            "train/tokens_per_second": tokens / max(seconds, 1e-9),
            "train/peak_memory_gib": memory.peak_gib(self.trainer.device),
        }
