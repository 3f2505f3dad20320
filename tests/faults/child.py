"""One command of training in a process of its own, as `python -m training.NAME` runs it, with a fault put in.

The server that forks it (`tests.faults.runs`) has imported all that it needs (`tests.faults.warm`), and has no threads.

An event is one change of a file system: a file opened for writing, a file of tensors written by Rust or C++, a rename,
a removal, a new folder. Events of a run are numbered from 0, in their order, which is the same in every run.
"""

import builtins
import errno
import io
import os
import pkgutil
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

# What is marked of a run, beside its events: the functions that its phases consist of.
PHASES = {
    "reference": "training.reference_cache.compute_reference",
    "check": "training.reference_cache.check_step_zero",
    "step": "training.trainer.Trainer.step",
    "evaluation": "training.pieces.Pieces.rows",
    "save": "training.checkpoints.Checkpoints.save",
}

WRITES = ("open", "serialize_file", "save")  # events after which a file has an empty or a whole content


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which event.

    Attributes:
        event: its number; -1: none.
        how: the process is killed before the event; "torn": what is written is cut after `size` bytes, and the process
            dies with it; "full": no space is left, from this event on, for `times` of them.
        clock: every look at the clock finds it so many seconds earlier than the one before.
    """

    event: int = -1
    how: Literal["before", "torn", "full"] = "before"
    size: int = 0
    times: int = 10**9
    clock: float = 0.0


NO_FAULT = Fault()


def run(name: str, arguments: Sequence[str], folder: Path, fault: Fault, output: Connection, marks: Connection) -> None:
    """The main function of the process. Its code is the command's; 0 where that returns."""
    for target in (1, 2):
        os.dup2(output.fileno(), target)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    sys.argv = [name, *arguments]
    _shorten()
    if fault.clock:
        _turn_back(fault.clock)
    watch = _Watch(folder.parent, fault, marks.fileno())
    watch.install()
    watch.mark("start")
    runpy.run_module(f"training.{name}", run_name="__main__")
    watch.mark("end")


class _Watch:
    """Sees the events below `root`, tells of them, and does the fault's harm."""

    def __init__(self, root: Path, fault: Fault, marks: int):
        self.root, self.fault, self.marks = os.path.realpath(root), fault, marks
        self.count = 0

    def mark(self, text: str) -> None:
        os.write(self.marks, f"{time.monotonic():.6f} {text}\n".encode())

    def install(self) -> None:
        import safetensors.torch
        import torch

        opened = self.wrapped("open", builtins.open, lambda file, mode="r", *a, **k: _writes(mode) and file)
        builtins.open = io.open = sys.modules["_io"].open = opened
        os.open = self.wrapped("open", os.open, _opened_by_flags)
        for module, names in {
            os: ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate"),
            safetensors.torch: ("serialize_file",),
        }.items():
            for name in names:
                setattr(module, name, self.wrapped(name, getattr(module, name), _path_of[name]))
        torch.save = self.wrapped("save", torch.save, lambda obj, f, *a, **k: isinstance(f, (str, os.PathLike)) and f)
        for name, path in PHASES.items():
            owner, _, function = path.rpartition(".")
            before = getattr(pkgutil.resolve_name(owner), function)
            importers = [module for name, module in sys.modules.items() if name.startswith("training.commands.")]
            for place in (pkgutil.resolve_name(owner), *importers):  # that have taken it by its name
                if getattr(place, function, None) is before:
                    setattr(place, function, self.marked(name, before))

    def marked(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.mark(f"begin {name}")
            result = function(*args, **kwargs)
            self.mark(f"end {name}")  # none where a signal has ended it
            return result

        return call

    def wrapped(self, name: str, function: Callable, path_of: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = self.inside(path_of(*args, **kwargs), kwargs.get("dir_fd"))
            if path is None or self.without_effect(name, path):
                return function(*args, **kwargs)
            number, self.count = self.count, self.count + 1
            self.mark(f"event {name} {path}")
            fault = self.fault
            if number == fault.event and fault.how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if number == fault.event and fault.how == "torn":
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
            full = fault.how == "full" and 0 <= fault.event <= number < fault.event + fault.times
            if full and name in ("mkdir", *WRITES):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return function(*args, **kwargs)

        return call

    def without_effect(self, name: str, path: str) -> bool:
        there = os.path.lexists(os.path.join(self.root, path))
        return there if name == "mkdir" else not there and name in ("unlink", "remove", "rmdir")

    def inside(self, path: Any, dir_fd: int | None) -> str | None:
        """The path from `root` on; None where it is elsewhere, or nothing is changed."""
        if path is None or path is False or isinstance(path, int):
            return None
        base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        return os.path.relpath(whole, self.root) if whole.startswith(self.root + os.sep) else None


def _writes(mode: str) -> bool:
    return not {"w", "a", "x", "+"}.isdisjoint(mode)


def _opened_by_flags(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and path


def _first(path: Any, *args: Any, **kwargs: Any) -> Any:
    return path


def _second(first: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    return path


_path_of = {
    name: _second if name in ("rename", "replace", "link", "symlink", "serialize_file") else _first
    for name in (
        *("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "truncate", "serialize_file"),
    )
}


def _shorten() -> None:
    """Figures contain one line of text instead of a drawing, and answers are short: this halves the time."""
    from matplotlib.figure import Figure

    from training import generation

    complete_all = generation.complete_all

    def short(model: Any, format: Any, questions: Any, max_new_tokens: int, *args: Any, **given: Any) -> list[str]:
        return complete_all(model, format, questions, min(max_new_tokens, 2), *args, **given)

    generation.complete_all = short
    Figure.savefig = lambda self, path, **given: Path(path).write_bytes(b"a figure")


def _turn_back(seconds: float) -> None:
    """The wall clock goes backwards; the monotonic one cannot."""
    real, looks = time.time, [0]

    def earlier() -> float:
        looks[0] += 1
        return real() - looks[0] * seconds

    time.time = earlier
    time.time_ns = lambda: int(earlier() * 1e9)
