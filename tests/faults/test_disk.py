"""No space left, read-only folders, a clock that goes back: a message instead of a result, or the same result."""

import os
import subprocess
import time

import pytest

from tests.faults.child import WRITES, Fault
from tests.faults.runs import check_refused

FULL = ("No space left on device", "free space", "same command")
YEAR = 365 * 86400.0


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")

    def remount(self, options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def used(self):
        """KiB."""
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024

    def unmount(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    """Skips where only root may mount, and is not asking."""
    made = Disk(tmp_path / "disk")
    yield made
    made.unmount()


@pytest.mark.parametrize("repetition", range(4))
@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate", "grid"])
def test_a_full_disk(name, repetition, subjects, disk, rng, tried):
    """Of a random size, less than a run needs; with more space the same command goes on."""
    subject = subjects[name]
    needed = sum(len(content) if isinstance(content, bytes) else 2000 for content in subject.expected.values()) // 1024
    disk.remount(f"size={rng.randrange(8, needed + 900)}k")
    ended = subject.run(disk.path)
    tried("full disks", int(ended.code != 0))
    if ended.code:
        check_refused(ended, *FULL)
    disk.remount("size=64m")
    subject.check_resumed(disk.path)


@pytest.mark.parametrize("name", ["unlearn", "grid"])
def test_no_space_at_a_write(name, subjects, rng, tmp_path, tried):
    """For one write alone, or from there on."""
    subject = subjects[name]
    writes = [k for k, event in enumerate(subject.whole.events) if event.split()[0] in WRITES]
    for k in rng.sample(writes, 8):
        case = tmp_path / f"{k}"
        ended = subject.run(case, Fault(k, "full", times=rng.choice([1, 10**9])))
        tried("writes without space", int(ended.code != 0))
        if ended.code:
            check_refused(ended, *FULL)
        subject.check_resumed(case)


@pytest.mark.parametrize("name", ["unlearn", "finetune", "evaluate", "grid"])
def test_a_read_only_folder(name, subjects, disk, tried):
    """Reported before any computation; existing files are kept."""
    subject = subjects[name]
    (disk.path / "run" / "out").mkdir(parents=True)
    half = len(subject.whole.events) // 2
    for stop in (None, Fault(half, "before")):
        if stop:
            subject.run(disk.path, stop)
        disk.remount("ro")
        ended = subject.run(disk.path)
        check_refused(ended, "--out", "[Rr]ead-only|not writable|cannot be written")
        assert not ended.times("begin step") and not ended.times("begin evaluation")
        disk.remount("rw")
        tried("read-only folders")
    subject.check_resumed(disk.path)


@pytest.mark.parametrize("filled", [False, True])
def test_a_read_only_cache(filled, subjects, disk, tmp_path, tried):
    """With all that a run needs it is as good as any; without, that is said at once."""
    subject, case = subjects["unlearn"], tmp_path / "case"
    case.mkdir()
    (case / "cache").symlink_to(disk.path)
    if filled:
        subject.run(case, Fault(len(subject.whole.events) // 2, "before"))
    disk.remount("ro")
    ended = subject.run(case)
    tried("read-only folders")
    if filled:
        assert ended.code == 0, ended.output
    else:
        check_refused(ended, "--reference_cache", "[Rr]ead-only|not writable|cannot be written")
        assert not ended.times("begin step")


@pytest.mark.parametrize("name", ["unlearn", "grid"])
def test_a_clock_that_goes_back(name, subjects, rng, tmp_path, tried):
    """An hour at every look, also after a kill, with files that are from the future or very old."""
    subject = subjects[name]
    events = len(subject.whole.events)
    subject.run(tmp_path, Fault(rng.randrange(events // 3, events), "before", clock=3600.0))
    now = time.time()
    for path in tmp_path.rglob("*"):
        moment = now + rng.choice([-10 * YEAR, YEAR])
        os.utime(path, (moment, moment), follow_symlinks=False)
    ended = subject.run(tmp_path, Fault(clock=3600.0))
    assert ended.code == 0, ended.output
    assert not subject.differences(tmp_path)
    tried("clocks that go back", 2)
