"""Writing aside and renaming, finding what was finished, and never taking what is damaged."""

import errno
import json
import os

import pytest
from filelock import FileLock

from training import locks, store
from training.locks import alone, turn
from training.store import (
    DamagedError,
    StorageError,
    check_seal,
    check_writable,
    clear_leftovers,
    fingerprint,
    finished,
    read_record,
    remove,
    renamed_when_done,
    seal,
    write_record,
    write_text,
)


def write_folder(path, text):
    with renamed_when_done(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_name_appears_only_when_all_is_written(tmp_path):
    path = tmp_path / "folder" / "result"
    with renamed_when_done(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["result"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "model"
    write_folder(path, "old")
    with pytest.raises(OSError, match="out of luck"), renamed_when_done(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("new")
        raise OSError("out of luck")
    assert names(path) == ["weights"] and names(tmp_path) == ["model"]
    write_folder(path, "new")
    assert (path / "weights").read_text() == "new" and names(tmp_path) == ["model"]


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    """One begins while the other is at it: neither takes the other's file away, and the last one wins."""
    path = tmp_path / "cache"
    with renamed_when_done(path) as first:
        first.write_text("first")
        with renamed_when_done(path) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert path.read_text() == "second"
    assert path.read_text() == "first" and names(tmp_path) == ["cache"]


class KilledError(BaseException):
    """Nothing after it is done, as after SIGKILL."""


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(n, write)`: `write` dies before its n-th rename or removal, and cleans nothing up."""

    def run(number, write):
        calls = []

        def counted(original):
            def call(*args, **kwargs):
                calls.append(original)
                if len(calls) >= number:  # and nothing more happens
                    raise KilledError
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (store.shutil, "rmtree")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(store.Path, "unlink", counted(store.Path.unlink))
            patch.setattr(store.Path, "rmdir", counted(store.Path.rmdir))
            try:
                write()
            except KilledError:
                return True
        return False

    return run


def test_killed_at_any_moment_a_folder_is_the_old_one_or_the_new_one(tmp_path, killed_at, tried):
    moments = 0
    for number in range(1, 30):
        folder = tmp_path / f"{number}"
        write_folder(folder / "model", "old")
        died = killed_at(number, lambda folder=folder: write_folder(folder / "model", "new"))
        clear_leftovers(folder)
        assert names(folder) == ["model"]
        assert (folder / "model" / "weights").read_text() in ("old", "new")
        if not died:
            break
        moments += 1
    assert moments >= 4 and not died
    tried("moments of a death while writing", moments)


def test_killed_at_any_moment_a_folder_is_there_or_removed(tmp_path, killed_at):
    for number in range(1, 30):
        folder = tmp_path / f"{number}"
        write_folder(folder / "checkpoint", "old")
        died = killed_at(number, lambda folder=folder: remove(folder / "checkpoint"))
        clear_leftovers(folder)
        assert names(folder) in ([], ["checkpoint"]) and all(names(path) == ["weights"] for path in folder.iterdir())
        if not died:
            break
    assert number >= 4 and not died


def test_what_a_living_process_writes_is_no_leftover(tmp_path):
    with renamed_when_done(tmp_path / "a.b") as temporary:
        temporary.write_text("x")
        clear_leftovers(tmp_path)
        assert temporary.exists()
    (tmp_path / ".notes.of.mine.partial").mkdir()
    (tmp_path / ".notes.of.mine.partial" / "text").write_text("mine")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".notes.of.mine.partial", "a.b"]


def test_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Every file and folder is synchronised, then renamed, then the folder that has the name."""
    done = []
    monkeypatch.setattr(store.os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr(store.os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with renamed_when_done(tmp_path / "model") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "weights").write_text("x")
    *before, last = done
    assert last == str(tmp_path) and before.pop() == "rename"
    assert {os.path.basename(path) for path in before} == {"weights", "inner", "model"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_what_to_do(error, tmp_path):
    path = tmp_path / "checkpoint"
    write_folder(path, "old")
    with (
        pytest.raises(StorageError, match=r"checkpoint cannot be written: No space .* free space, and run the same"),
        renamed_when_done(path),
    ):
        raise error
    assert (path / "weights").read_text() == "old" and names(tmp_path) == ["checkpoint"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    def closed(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    check_writable(tmp_path / "new", "--out")
    assert names(tmp_path / "new") == []
    monkeypatch.setattr(store.tempfile, "TemporaryFile", closed)
    with pytest.raises(StorageError, match=r"--out .*new cannot be written: Read-only file system.*another folder"):
        check_writable(tmp_path / "new", "--out")


def test_only_the_same_key_is_found(tmp_path):
    path = tmp_path / "record.json"
    key = fingerprint({"lr": 1e-3, "seed": 0})
    assert finished(path, key) is None
    write_record(path, {"key": key, "loss": 0.5, "nested": {1: (float("nan"), "\u00e9")}})
    found = finished(path, fingerprint({"seed": 0, "lr": 1e-3}))
    assert found["loss"] == 0.5 and found.keys() == {"key", "loss", "nested"}
    assert finished(path, fingerprint({"seed": 1, "lr": 1e-3})) is None


def test_a_damaged_record_is_never_read(tmp_path, tried):
    """Cut anywhere, or with any one bit changed: refused, unless it says the same, as with other white space."""
    path, record = tmp_path / "record.json", {"key": "k", "loss": 0.25, "steps": [1, 2], "text": "\u00fc"}
    write_record(path, record)
    whole = path.read_bytes()
    changed = [whole[:size] for size in range(len(whole) - 1)]
    changed += [whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (0, 5)]
    refused = 0
    for content in changed:
        path.write_bytes(content)
        try:
            assert read_record(path) == record
        except DamagedError as damage:
            refused += str(path) in str(damage)
            assert finished(path, "k") is None
    assert refused > 0.8 * len(changed)
    tried("damaged records", len(changed))
    for other in ("[]", "1", "{}", json.dumps(record)):
        path.write_text(other)
        with pytest.raises(DamagedError, match=r"record\.json is damaged"):
            read_record(path)


def test_a_seal_is_of_every_file(tmp_path):
    write_folder(tmp_path / "model", "weights")
    assert check_seal(tmp_path / "model") is None
    seal(tmp_path / "model", key="k")
    assert check_seal(tmp_path / "model")["key"] == "k"
    (tmp_path / "model" / "weights").write_text("Weights")
    with pytest.raises(DamagedError, match="weights has other bytes than were written"):
        check_seal(tmp_path / "model")
    (tmp_path / "model" / "weights").unlink()
    with pytest.raises(DamagedError, match="weights is absent"):
        check_seal(tmp_path / "model")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    """Which says who it is, and leaves nothing behind; an error gives the folder back."""
    with pytest.raises(ZeroDivisionError), alone(tmp_path / "out"):
        with (
            pytest.raises(ValueError, match=rf"--out .*out is in use by another run \(process {os.getpid()} on "),
            alone(tmp_path / "out"),
        ):
            pass
        1 / 0  # noqa: B018
    with alone(tmp_path / "out"):
        assert names(tmp_path / "out") == [".lock", ".owner.lock"]
    assert names(tmp_path / "out") == []


def test_one_run_waits_for_what_another_one_makes(tmp_path, monkeypatch):
    said, path = [], tmp_path / "cache" / "forget"
    path.parent.mkdir()
    other = FileLock(path.with_name(".forget.lock"))
    other.acquire()

    def made(seconds):
        write_text(path, "made")
        other.release()

    monkeypatch.setattr(locks.time, "sleep", made)
    with turn(path, said.append):
        assert path.read_text() == "made"
    assert len(said) == 1 and "which another run makes" in said[0] and names(path.parent) == ["forget"]


def test_what_is_removed_makes_room_where_there_is_none_for_a_lock(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_text("x")
    monkeypatch.setattr(store.FileLock, "acquire", full)
    remove(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
