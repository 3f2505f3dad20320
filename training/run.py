"""A training run with what goes around it: checkpoints, resumption, periodic evaluation, progress."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from training import distributed
from training.progress import progress
from training.trainer import Checkpoints, Job, Metrics, Trainer

Evaluate = Callable[[int, Progress], dict[str, Any]]  # after how many steps -> what to remember of the model


@dataclass(frozen=True)
class Schedule:
    """When things happen. The last step is always evaluated."""

    num_steps: int
    evaluate_every: int  # steps; 0: only before the first step and after the last
    save_every: int  # steps; 0: not by steps
    save_every_minutes: float = 0.0  # 0: not by time

    def evaluates(self, step: int) -> bool:
        return step == self.num_steps or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int, minutes: float) -> bool:
        """`minutes`: since the last checkpoint. What was done is saved by the run's end."""
        by_steps = self.save_every > 0 and step % self.save_every == 0
        by_time = self.save_every_minutes > 0 and minutes >= self.save_every_minutes
        return step < self.num_steps and (by_steps or by_time)


def run(
    trainer: Trainer,
    job: Job,
    schedule: Schedule,
    evaluate: Evaluate,
    *,
    label: str,
    checkpoints: Checkpoints | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train to the end, from the newest checkpoint if there is one. The history: an entry for each evaluation.

    An entry is {"step", "train_loss": the mean over the steps since the entry before, **evaluate(step)}.
    """
    console = console or Console(stderr=True)
    first, record = checkpoints.load(trainer) if checkpoints else (0, None)
    saved = time.monotonic()
    num_tokens, note = 0, ""

    def save(step: int) -> None:
        nonlocal saved
        if checkpoints:
            checkpoints.save(trainer, step, record)
        saved = time.monotonic()

    with progress(console) as display:
        if record is None:
            record = {"history": [{"step": 0, "train_loss": None, **evaluate(0, display)}], "losses": []}
        elif distributed.is_main():
            console.print(f"{label}: going on after step {first} of {len(job)}")
        history, losses = record["history"], record["losses"]
        task = display.add_task(label, total=len(job), completed=first, unit="steps", note="")
        started = time.monotonic()

        def after_pass(count: int) -> None:
            nonlocal num_tokens
            num_tokens += count * distributed.count()
            rate = num_tokens / (time.monotonic() - started)
            display.update(task, note=f"{note}{rate:.0f} tokens/s")

        def after_step(metrics: Metrics) -> None:
            nonlocal note, started
            losses.append(metrics.loss)
            note = f"loss {metrics.loss:.3f}, "
            display.update(task, advance=1)
            values = metrics._asdict()
            if schedule.evaluates(metrics.step):
                mean, paused = sum(losses) / len(losses), time.monotonic()
                history.append({"step": metrics.step, "train_loss": mean, **evaluate(metrics.step, display)})
                started += time.monotonic() - paused  # the rate is that of training alone
                losses.clear()
                values |= history[-1]
            trainer.log(values)
            if distributed.any_of(schedule.saves(metrics.step, (time.monotonic() - saved) / 60)):
                save(metrics.step)

        trainer.train(job, first_step=first, after_step=after_step, after_pass=after_pass, save=save)
    trainer.finish_log()
    return history
