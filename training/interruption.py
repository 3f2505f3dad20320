"""Ctrl-C and SIGTERM: stop a run without losing work.

Outside of training a signal ends the command at once: files on disk are complete at every moment. During training, and
where several processes have to agree, the signal is recorded and `check` ends the run: between passes, between steps,
and between the batches of an evaluation.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training import distributed

# Launchers forward a signal that the terminal or cluster has already sent to all processes. A second one this soon is
# the same signal.
REPEATED = 1.0  # seconds


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal. `step`: number of steps done, which are on disk if there are checkpoints."""

    def __init__(self, number: int = signal.SIGINT, step: int | None = None):
        where = "" if step is None else f" after step {step}"
        super().__init__(f"interrupted by {signal.Signals(number).name}{where}")
        self.number, self.step = number, step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in a shell."""
        return 128 + self.number


class _Signals:
    """The signal received, and how the current block handles it."""

    def __init__(self) -> None:
        self.number, self.at = 0, 0.0
        self.at_once: list[bool] = []  # of the blocks that the program is in
        self.before: dict[int, signal._HANDLER] = {}

    def enter(self, at_once: bool) -> None:
        outermost = not self.at_once
        if outermost:
            self.number = 0
            self.before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        self.at_once.append(at_once)  # before a signal can come
        if outermost:
            for number in self.before:
                signal.signal(number, self.receive)

    def leave(self) -> int:
        """The signal that has come, where no block outside of this one asks for it."""
        if len(self.at_once) == 1:
            self.restore()  # before there is no block that a signal would be of
        self.at_once.pop()
        number = self.number
        if not self.at_once:
            self.number = 0
        return 0 if self.at_once and not self.at_once[-1] else number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and time.monotonic() - self.at < REPEATED:
            return
        if self.number:  # the user insists
            self.restore()
            signal.raise_signal(number)
            return
        self.number, self.at = number, time.monotonic()
        if self.at_once[-1]:
            raise Interrupted(number)


_signals = _Signals()


@contextmanager
def interruptible(at_once: bool = False) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Interrupted`: `at_once`, or where `check` is called, and at the end of the block at the
    latest; a second one acts as usual.

    One of several processes may not leave the others alone, and waits for `check` in any case.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    _signals.enter(at_once and distributed.count() == 1)
    number = 0
    try:
        yield
    finally:
        number = _signals.leave()
    if number:
        raise Interrupted(number)


def check() -> None:
    """Raise `Interrupted` if a signal has come, in any process: all of them have to ask."""
    number = _signals.number
    if distributed.count() > 1:
        number = distributed.largest(number)
    if number:
        raise Interrupted(number)


def check_alone() -> None:
    """The same where nothing is to be agreed on: in several processes it does nothing, and takes no time."""
    if _signals.number and distributed.count() == 1:
        raise Interrupted(_signals.number)
