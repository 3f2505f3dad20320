"""Safe files: written aside and renamed, identified by a hash of what they depend on, checked when read.

Writing: into a private folder beside the target, synced to disk, then one rename. Two processes never share a private
folder, and leftovers of a killed process are removed by the next one that writes the same name. Reading: a JSON record
contains the sha256 of its other fields; the folder of a model or checkpoint has a record with the sha256 of its files
(`seal`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HASH, SEAL = "sha256", "files.json"
LOCK, ASIDE = ".lock", ".old"  # in a private folder, beside what is written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # by this file system


class StorageError(OSError):
    """A file cannot be written: the disk is full, or the folder is read-only."""


class DamagedError(ValueError):
    """A file differs from what was written: truncated or changed."""


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of the bytes of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """Hash of the names and bytes of the files in a folder, without subfolders."""
    return fingerprint({path.name: file_hash(path) for path in folder.iterdir() if path.is_file()})


# ------------------------------------------------------------------ writing


@contextmanager
def renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary name for `path` (file or folder), renamed to `path` only if the block ends without an error.

    If two processes write the same name, the last one wins. A folder that is replaced is first moved aside; if the
    process is killed before the new one has the name, the old one is restored (`clear_leftovers`).

    Raises:
        StorageError: the disk is full or the folder is read-only; what was there before is unchanged.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        with _private_folder(path) as private:
            temporary = private / path.name
            yield temporary
            _to_disk(temporary)
            if os.path.lexists(path) and (temporary.is_dir() or path.is_dir()):
                os.replace(path, private / ASIDE)  # a folder cannot be renamed over another
            os.replace(temporary, path)
            _sync(path.parent)


@contextmanager
def writing(path: Path, option: str = "") -> Iterator[None]:
    """Turn errors of a full disk or a read-only folder into a StorageError that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = _errno(error)
        if number not in (*FULL, *CLOSED):
            raise
        advice = "make it writable, or choose another folder"
        if number in FULL:
            advice = "free space, and run the same command: it goes on from what is there"
        what = f"{option} {path}".strip()
        raise StorageError(
            f"{what} cannot be written: {os.strerror(number)}; what was there before is whole; {advice}"
        ) from error


def check_writable(folder: Path, option: str) -> None:
    """StorageError if the folder is not writable, to be raised before the work and not after it."""
    with writing(folder, option):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left when writing `name`, and restore what they had moved aside."""
    for private in folder.glob(f".{name}.*.partial"):
        with suppress(Timeout, OSError):
            if not (private / LOCK).exists():
                private.rmdir()  # if it is empty; an owner who was about to lock it takes another one
                continue
            with FileLock(private / LOCK, blocking=False):
                _leave(private, private.with_name(private.name[1:].rsplit(".", 2)[0]))


@contextmanager
def _private_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked while this process runs; the operating system releases the lock when it ends."""
    while True:
        private = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        lock = FileLock(private / LOCK)
        try:
            lock.acquire()
            break
        except FileNotFoundError:  # taken for a leftover just before it was locked
            continue
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            break  # without locks nobody clears leftovers either
    try:
        yield private
    finally:
        _leave(private, path)
        lock.release()


def _leave(private: Path, path: Path) -> None:
    if not os.path.lexists(path):
        with suppress(FileNotFoundError):
            os.replace(private / ASIDE, path)
    with suppress(OSError):
        for inside in private.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside, ignore_errors=True)
            elif inside.name != LOCK:
                inside.unlink()
        (private / LOCK).unlink()  # last: without it nobody would know that this is a leftover
        private.rmdir()


def _to_disk(path: Path) -> None:
    """Sync files and folders: a rename may otherwise reach the disk before their contents."""
    for folder, _, files in os.walk(path):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if path.is_file():
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # a file system whose folders cannot be synchronised
            raise
    finally:
        os.close(descriptor)


def _errno(error: Exception) -> int | None:
    """The errno of an error; libraries in Rust have it only in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_text(path: Path, text: str) -> None:
    with renamed_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_texts(folder: Path, texts: Mapping[str, str], replace: bool = False) -> None:
    """Write several files of a folder. ValueError, and nothing is written, if one exists with other content."""
    changed = [
        name for name, text in texts.items() if (f := folder / name).exists() and f.read_text(encoding="utf-8") != text
    ]
    if changed and not replace:
        raise ValueError(
            f"--out {folder} has {', '.join(sorted(changed))} with another content; choose another folder, or replace "
            "them by --fresh"
        )
    for name, text in texts.items():
        write_text(folder / name, text)


# ------------------------------------------------------------------ records and seals


def hashed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own hash, as it will be read back."""
    plain = json.loads(json.dumps({name: value for name, value in record.items() if name != HASH}))
    return plain | {HASH: fingerprint(plain)}


def unhashed(content: Any, name: object) -> Any:
    """The inverse of `hashed`; content without a hash is returned unchanged. DamagedError if the hash differs."""
    if not isinstance(content, dict) or HASH not in content:
        return content
    record = {key: value for key, value in content.items() if key != HASH}
    if fingerprint(record) != content[HASH]:
        raise DamagedError(f"{name} is damaged: its content differs from what was written; make it again")
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_json(path, hashed(record))


def check_json(path: Path) -> None:
    """DamagedError if the file is not JSON, or its hash does not match its content."""
    try:
        unhashed(json.loads(path.read_text(encoding="utf-8")), path)
    except DamagedError:
        raise
    except (ValueError, RecursionError) as reason:
        raise DamagedError(f"{path} is damaged: {reason}") from None


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is no file. DamagedError if it was changed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as reason:  # no JSON, or no text
        raise DamagedError(f"{path} is damaged: {reason}") from None
    if not isinstance(content, dict) or HASH not in content:
        raise DamagedError(f"{path} is damaged, or of another version: it has no {HASH} of itself")
    return unhashed(content, path)


def finished(path: Path, key: str) -> dict[str, Any] | None:
    """The record at `path` if it has the same key. None: absent, damaged, or of other settings."""
    try:
        record = read_record(path)
    except DamagedError:
        return None
    return record if record is not None and record.get("key") == key else None


def seal(folder: Path, name: str = SEAL, **record: Any) -> None:
    """Write a record with the hashes of all files in the folder, as its last file."""
    files = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / name).write_text(json.dumps(hashed({**record, "files": files}), indent=1), encoding="utf-8")


def check_seal(folder: Path, name: str = SEAL, hashes: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """The record of `seal`; None for a folder without one. DamagedError if a file is missing or changed.

    `hashes`: of files that were hashed before.
    """
    record = read_record(folder / name)
    for file, expected in (record or {}).get("files", {}).items():
        path = inside(folder, file)
        if not path.is_file():
            raise DamagedError(f"{folder} is damaged: {file} is absent")
        if ((hashes or {}).get(file) or file_hash(path)) != expected:
            raise DamagedError(f"{folder} is damaged: {file} has other bytes than were written")
    return record


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a record names. DamagedError if the name leads out of the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DamagedError(f"{folder} is damaged: expected the names of files in it, got {name!r}")
    return folder / name


def remove(*paths: Path) -> None:
    """Remove files and folders.

    A folder is first renamed, so that a killed process leaves no half of it; if the disk is too full, file by file.
    """
    for path in paths:
        with writing(path):
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
                continue
            try:
                with _private_folder(path) as private:
                    os.replace(path, private / path.name)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                shutil.rmtree(path)
