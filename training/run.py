"""A training run with what goes around it: checkpoints, resumption, periodic evaluation, progress."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training import processes
from training.trainer import Checkpoints, Job, Metrics, Trainer

Evaluate = Callable[[int], dict[str, Any]]  # after how many steps -> what to remember of the model


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps. The last step is always evaluated."""

    num_steps: int
    evaluate_every: int  # 0: only before the first step and after the last
    save_every: int  # 0: only when interrupted

    def evaluates(self, step: int) -> bool:
        return step == self.num_steps or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def saves(self, step: int) -> bool:
        return self.save_every > 0 and step % self.save_every == 0 and step < self.num_steps


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
    if record is None:
        record = {"history": [{"step": 0, "train_loss": None, **evaluate(0)}], "losses": []}
    elif processes.is_main():
        console.print(f"{label}: going on after step {first} of {len(job)}")
    history, losses = record["history"], record["losses"]

    def save(step: int) -> None:
        if checkpoints:
            checkpoints.save(trainer, step, record)

    with progress_bar(console) as progress:
        task = progress.add_task(label, total=len(job), completed=first, note="")

        def after_step(metrics: Metrics) -> None:
            losses.append(metrics.loss)
            progress.update(task, advance=1, note=f"loss {metrics.loss:.3f}")
            values = metrics._asdict()
            if schedule.evaluates(metrics.step):
                history.append(
                    {"step": metrics.step, "train_loss": sum(losses) / len(losses), **evaluate(metrics.step)}
                )
                losses.clear()
                values |= history[-1]
            trainer.log(values)
            if schedule.saves(metrics.step):
                save(metrics.step)

        trainer.train(job, first_step=first, after_step=after_step, save=save)
    trainer.finish_log()
    return history


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not processes.is_main(),
    )
