"""Finished stages on disk: written to a temporary name and renamed, found again by a key of all they depend on."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of its bytes, which are not in memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """Of the names and bytes of its files, not of what is in its folders."""
    return fingerprint({path.name: file_hash(path) for path in folder.iterdir() if path.is_file()})


@contextmanager
def renamed_when_done(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` (file or folder) that takes its name only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    remove(temporary)  # the rest of an interrupted run
    yield temporary
    if temporary.is_dir():
        remove(path)  # a folder cannot be renamed over another; without it the stage is merely run again
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with renamed_when_done(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_texts(folder: Path, texts: Mapping[str, str], replace: bool = False) -> None:
    """Several files of a folder. ValueError, and nothing is written, where one is there with another content."""
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


def finished(path: Path, key: str) -> dict | None:
    """The JSON record at `path` if it was written under the same key; None where it is absent or of other settings."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.get("key") == key else None


def remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
