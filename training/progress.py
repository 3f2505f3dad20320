"""Progress of long work: bars on a terminal, otherwise a line at least every 30 seconds.

    [14:03:20] NPO+RT: 14/60 steps, loss 3.201, 412 tokens/s, 0:07:12 left | Evaluation: 64/1200 rows, answers

A task of rich's `Progress` with the fields `unit` and `note`, which may be left out.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from training import distributed

OnRows = Callable[[int, int], None]  # numbers of rows and of their tokens that are done
FIRST_LINE, INTERVAL = 2.0, 20.0  # seconds; a line is printed even if nothing has changed
RATE_OVER = 600.0  # seconds of work used to estimate the remaining time


class State(ProgressColumn):
    """The state of a task as text."""

    def render(self, task: Task) -> Text:
        return Text(state(task))


def state(task: Task) -> str:
    """`14/60 steps, loss 3.201, 412 tokens/s`"""
    total = "?" if task.total is None else f"{task.total:.0f}"
    parts = [f"{task.completed:.0f}/{total} {task.fields.get('unit', '')}".rstrip()]
    if task.fields.get("note"):
        parts.append(str(task.fields["note"]))
    return ", ".join(parts)


@contextmanager
def progress(console: Console | None = None) -> Iterator[Progress]:
    """A display for the tasks that are added to it. Only the main process shows it: the others do the same work."""
    console = console or Console(stderr=True)
    columns = ("{task.description:<16}", BarColumn(), State(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = distributed.is_main() and not console.quiet
    display = Progress(
        *columns, console=console, disable=not (shown and console.is_terminal), speed_estimate_period=RATE_OVER
    )
    if not shown or console.is_terminal:
        with display:
            yield display
        return
    ended = threading.Event()
    lines = threading.Thread(target=_print_lines, args=(display, console, ended), daemon=True)
    lines.start()
    try:
        yield display
    finally:
        ended.set()
        lines.join()


def nothing(rows: int, tokens: int = 0) -> None:
    """An `OnRows` that does nothing."""


class Counted:
    """A new task of a display. Call it with the numbers of rows and tokens done since the last call.

    `stage` begins a part of the work with its own token count: reading and generating differ in speed.
    """

    def __init__(self, display: Progress, label: str, total: int, unit: str = "rows"):
        self.display, self.label = display, label
        self.task = display.add_task(label, total=total, unit=unit)
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.rows = 0
        self.stage("")

    def stage(self, name: str, note: str = "") -> None:
        """`name`: what happens to the tokens from now on ("read", "generated"); `note`: text to show."""
        self._name, self._note, self._since = name, note, time.monotonic()
        self.display.update(self.task, note=note)

    def __call__(self, rows: int, tokens: int = 0) -> None:
        now, name = time.monotonic(), self._name
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self.tokens[name] = self.tokens.get(name, 0) + tokens
        self.rows, self._since = self.rows + rows, now
        speed = f"{self.tokens[name] / max(self.seconds[name], 1e-9):.0f} tokens/s" if self.tokens[name] else ""
        self.display.update(self.task, advance=rows, note=", ".join(part for part in (self._note, speed) if part))

    def done(self) -> None:
        """Remove the task and print its size and speed."""
        self.display.remove_task(self.task)
        parts = [f"{self.rows} rows in {timedelta(seconds=round(sum(self.seconds.values())))}"]
        parts += [
            f"{count} tokens {name} at {count / max(self.seconds[name], 1e-9):.0f} tokens/s"
            for name, count in self.tokens.items()
            if count
        ]
        if distributed.is_main():
            self.display.console.print(f"{self.label}: {', '.join(parts)}", markup=False, soft_wrap=True)


def counted(display: Progress, label: str, total: int, unit: str = "rows") -> Counted:
    return Counted(display, label, total, unit)


def _print_lines(display: Progress, console: Console, ended: threading.Event) -> None:
    """Print the unfinished tasks at intervals, and each finished task once."""
    told: set[int] = set()
    wait, stop = FIRST_LINE, False
    while not stop:
        stop, wait = ended.wait(wait), INTERVAL
        tasks = [task for task in list(display.tasks) if task.id not in told]
        told |= {task.id for task in tasks if task.finished}
        if tasks:
            console.print(
                f"[{time.strftime('%H:%M:%S')}] {' | '.join(map(_line, tasks))}", markup=False, soft_wrap=True
            )


def _line(task: Task) -> str:
    left = task.time_remaining
    ending = f", {timedelta(seconds=round(left))} left" if left and not task.finished else ""
    if task.finished:
        ending = f", {timedelta(seconds=round(task.finished_time or 0))} in all"
    return f"{task.description}: {state(task)}{ending}"
