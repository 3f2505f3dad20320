"""Locks between processes. The operating system releases a lock when its process ends, for any reason."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from training import distributed
from training.interruption import check
from training.store import UNSUPPORTED, StorageError, writing

AGAIN = 0.2  # seconds between two looks at a lock that another process has


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Create and lock the folder of a run. If the run has several processes, one of them takes the lock.

    Raises:
        ValueError: another run holds the lock; the message names the process.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    taken = False
    try:
        if distributed.is_main():
            try:
                _acquire(lock)
            except Timeout:
                taken = True
            except StorageError:
                pass  # results of a read-only folder can be found; to write them will fail
        if distributed.any_of(taken):
            raise ValueError(
                f"--out {folder} is in use by another run ({_owner(lock)}); wait until it ends, or choose another "
                "folder"
            )
        yield
    finally:
        _give_back(lock)


@contextmanager
def turn(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Wait, with a message, until no other run is writing `path`.

    A run of several processes does not wait and writes it itself: its processes would time out waiting for each other.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    waited = False
    try:
        while distributed.count() == 1:
            try:
                _acquire(lock)
                break
            except Timeout:
                if not waited:
                    say(f"waiting for {path}, which another run makes ({_owner(lock)})")
                waited = True
                check()
                time.sleep(AGAIN)
        yield
    finally:
        _give_back(lock)


def _acquire(lock: FileLock) -> None:
    path = Path(lock.lock_file)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return  # nothing keeps two runs apart there
        _owner_file(lock).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")


def _owner(lock: FileLock) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return _owner_file(lock).read_text(encoding="utf-8").strip() or "unknown"
    return "unknown"


def _owner_file(lock: FileLock) -> Path:
    """Beside the lock, whose own content may be filelock's, where a file system has no locks."""
    path = Path(lock.lock_file)
    return path.with_name(f".owner{path.name}")


def _give_back(lock: FileLock) -> None:
    if lock.is_locked:
        _owner_file(lock).unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it sees that, and makes a new file
        lock.release()
