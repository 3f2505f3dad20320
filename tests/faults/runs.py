"""Commands of training as processes that can be killed at a moment: started, watched, killed, and run again.

Each would import for seconds; a server does it once (`tests.faults.warm`) and forks a process for every run
(`tests.faults.child`).
"""

import fcntl
import multiprocessing
import os
import re
import select
import signal
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.faults.child import NO_FAULT, Fault, run

HANGS = 150.0  # seconds after which a run is taken for one that hangs
PIPE = 2**20  # bytes that a run may say before anybody listens
CONTEXT = multiprocessing.get_context("forkserver")


def use_own_server() -> None:
    """A process has one server; that of other tests has other imports. The next run starts the new one."""
    stop_server()
    CONTEXT.set_forkserver_preload(["tests.faults.warm"])


def stop_server() -> None:
    forkserver._forkserver._stop()


class Mark(NamedTuple):
    """`text` at `time`, of the monotonic clock."""

    time: float
    text: str


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (-9 where SIGKILL ended it), what it printed, its marks."""

    code: int
    output: str
    marks: list[Mark]

    @property
    def events(self) -> list[str]:
        return [mark.text.removeprefix("event ") for mark in self.marks if mark.text.startswith("event ")]

    def times(self, name: str) -> list[float]:
        """Of each mark of this name."""
        return [mark.time for mark in self.marks if mark.text == name]


class Run:
    """A command that runs, in `folder`."""

    def __init__(self, command: list[str], folder: Path, fault: Fault = NO_FAULT):
        folder.mkdir(parents=True, exist_ok=True)
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        for reader, writer in pipes:
            fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
            os.set_blocking(reader.fileno(), False)
        (self._output, output), (self._marks, marks) = pipes
        self.process: BaseProcess = CONTEXT.Process(
            target=run, args=(command[0], command[1:], folder, fault, output, marks)
        )
        self.process.start()
        for writer in (output, marks):
            writer.close()
        self._told: list[Mark] = []
        self._rest = b""

    def wait_for(self, text: str, occurrence: int = 0) -> bool:
        """Until the mark comes for the (occurrence + 1)-th time; False where the run has ended before."""
        ends = time.monotonic() + HANGS
        while time.monotonic() < ends:
            if len([mark for mark in self._told if mark.text == text]) > occurrence:
                return True
            ready, _, _ = select.select([self._marks, self.process.sentinel], [], [], 1.0)
            if not self._read_marks() and self.process.sentinel in ready:
                return False
        raise self._hangs()

    def send(self, number: int) -> bool:
        """A signal; False where the run has ended."""
        if not self.process.is_alive():
            return False
        os.kill(self.process.pid, number)
        return True

    def end(self) -> Ended:
        """Waits for it."""
        self.process.join(HANGS)
        if self.process.is_alive():
            raise self._hangs()
        self._read_marks()
        return Ended(self.process.exitcode, _read(self._output.fileno()).decode(errors="replace"), self._told)

    def _read_marks(self) -> bool:
        """Whether there were any."""
        *lines, self._rest = (self._rest + _read(self._marks.fileno())).split(b"\n")
        for line in lines:
            moment, text = line.decode().split(" ", 1)
            self._told.append(Mark(float(moment), text))
        return bool(lines)

    def _hangs(self) -> AssertionError:
        self.send(signal.SIGKILL)
        self.process.join()
        said = _read(self._output.fileno()).decode(errors="replace")
        return AssertionError(f"the run hangs, or takes more than {HANGS:.0f} s; it has said\n{said}")


def run_to_end(command: list[str], folder: Path, fault: Fault = NO_FAULT) -> Ended:
    return Run(command, folder, fault).end()


def succeeded(ended: Ended) -> Ended:
    assert ended.code == 0, f"exit code {ended.code}\n{ended.output}"
    return ended


def check_refused(ended: Ended, *patterns: str) -> None:
    """A nonzero exit code, and a message without a traceback that has each of the patterns."""
    assert ended.code not in (0, None) and ended.code > 0, f"exit code {ended.code}\n{ended.output}"
    assert "Traceback" not in ended.output, ended.output
    for pattern in patterns:
        assert re.search(pattern, ended.output), f"expected {pattern!r} in\n{ended.output}"


def _read(descriptor: int) -> bytes:
    """All that is there now."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except BlockingIOError:
            part = b""
        if not part:
            return b"".join(parts)
        parts.append(part)
