"""The folder of a run: what it holds, how a run begins and how it ends.

run.json holds a key, a hash of everything that the result depends on. options.yaml holds the options (`--config` reads
it). config.json (settings without paths, versions, the hash of metrics.json) is written last: it marks the run as
finished, and the same command then returns its results. A different command on the same folder is refused until --fresh
removes the files of the run. The same command is refused while it is running.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from training import distributed
from training.locks import alone
from training.store import (
    DamagedError,
    check_writable,
    clear_leftovers,
    file_hash,
    finished,
    inside,
    read_record,
    remove,
    write_json,
    write_record,
    write_text,
)
from training.versions import versions

# Files that runs write into their folders, in the order of removal: config.json, which marks a finished run, goes
# first, and run.json, which identifies the rest, goes last.
RUN_FILES = (
    *("config.json", "options.yaml", "metrics.json", "report.md", "eval_log_aggregated.json"),
    *("figure.png", "beta.png", "collapse.png", "lengths.png", "model", "adapter", "eval", "reference"),
    *("tensorboard", "wandb", "trackers.json"),
    *("checkpoint-*", ".*.partial", ".*.pieces", "*_EVAL.json", "*_SUMMARY.json", "run.json"),
)
# Options that are paths or do not affect the result: not in config.json.
NO_PATHS = (
    *("out", "data_dir", "reference_cache", "retain_log", "start_log", "from_log", "alternates"),
    "fluency_classifier",
    *("fresh", "dry_run", "json", "list"),
)


def public(*options: Any) -> dict[str, Any]:
    """The settings of options dataclasses without this machine's paths."""
    settings = {name: value for some in options for name, value in asdict(some).items()}
    return {
        name: model_name(value) if name == "model" and value is not None else value
        for name, value in settings.items()
        if name not in NO_PATHS or (name == "data_dir" and is_no_path(value))
    }


def is_no_path(data_dir: object) -> bool:
    """Whether it is the name of a data set on the hub, or of the generated one."""
    named = isinstance(data_dir, str) and re.fullmatch(r"[\w-]+(/[\w.-]+)?", data_dir)
    return bool(named) and not Path(str(data_dir)).exists()


def model_name(model: str | Path) -> str:
    """A hub name or a folder as reports show it: `runs/full/model` becomes `full`."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


class RunFolder:
    """`path`, for the run of these options."""

    def __init__(self, path: Path, *options: Any):
        self.path, self.options = path, options
        self.key = ""
        self.results: tuple[str, ...] = ()  # files beside metrics.json whose hashes config.json has

    @property
    def settings(self) -> dict[str, Any]:
        return public(*self.options)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A lock from `begin` to `finish`. ValueError if another run uses the folder, or if it is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path}: expected a folder, got a file")
        with alone(self.path):
            yield

    def begin(self, key: str, fresh: bool = False, parts: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """metrics.json if this run is finished; None if it has to be run, from its checkpoint if there is one.

        `fresh` removes another run, finished or not, and this run if it is finished. `parts`: the hashes that the key
        is made of, used to report how another run differs.

        Raises:
            ValueError: the folder holds another run, or something else, or a damaged record, or `fresh` would remove
                files that this run needs.
        """
        path, self.key = self.path, key
        complete, another, metrics = False, "", None
        try:
            complete, another, metrics = self._found(parts or {})
        except DamagedError as reason:
            if not fresh:
                raise ValueError(f"--out: {reason}; --fresh runs it again, from the beginning") from None
            another = str(reason)
        distributed.wait()  # every process has looked before one writes
        if fresh and (complete or another):
            self._check_nothing_needed_is_removed()
            distributed.on_main(lambda: remove(*(file for name in RUN_FILES for file in path.glob(name))))
        elif complete:
            distributed.on_main(self._clear_up_finished)
            return metrics
        elif another:
            raise ValueError(f"--out {path} holds a run with {another}; choose another folder, or remove it by --fresh")
        distributed.on_main(lambda: self._write_options(parts or {}))
        return None

    def _found(self, parts: Mapping[str, str]) -> tuple[bool, str, dict[str, Any] | None]:
        """(whether this run is finished, how an existing other run differs, the metrics)."""
        path = self.path
        if (path / "config.json").exists() and not (path / "run.json").exists():
            raise ValueError(f"--out {path} holds a config.json that is of no run; choose another folder")
        config, run = read_record(path / "config.json"), self._run_record()
        if config is not None and config["key"] == self.key:
            for name, expected in config["files"].items():
                file = inside(path, name)
                if not file.is_file() or file_hash(file) != expected:
                    raise DamagedError(f"{file} is damaged: absent, or with other bytes than were written")
            return True, "", json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        left = config is not None or any(path.glob("checkpoint-*"))
        if not left or (run is not None and run["key"] == self.key):
            return False, "", None
        others = (run or {}).get("parts", {})
        differ = [name for name, value in parts.items() if name in others and others[name] != value]
        return False, "other settings, data or weights" + (f" (different: {', '.join(differ)})" if differ else ""), None

    def _run_record(self) -> dict[str, Any] | None:
        """run.json. If it is damaged, the checkpoints identify the run."""
        try:
            return read_record(self.path / "run.json")
        except DamagedError:
            if not any(finished(progress, self.key) for progress in self.path.glob("checkpoint-*/progress.json")):
                raise
            return {"key": self.key}

    def finish(self, metrics: dict[str, Any], **record: Any) -> dict[str, Any]:
        """Write metrics.json and config.json."""
        config = {"key": self.key, "settings": self.settings, "versions": versions(), **record}

        def write() -> None:
            path = self.path / "metrics.json"
            write_json(path, metrics)
            files = {name: file_hash(self.path / name) for name in (path.name, *self.results)}
            write_record(self.path / "config.json", config | {"files": files})

        distributed.on_main(write)
        return metrics

    def _clear_up(self, finished: bool = False) -> None:
        """Remove the leftovers of a killed run."""
        for folder in (self.path, *(path for path in self.path.glob("*") if path.is_dir())):  # eval/ among them
            clear_leftovers(folder)
        if finished:
            remove(*self.path.glob("checkpoint-*"))

    def _clear_up_finished(self) -> None:
        with suppress(OSError):  # a read-only folder can be read
            self._clear_up(finished=True)

    def _write_options(self, parts: Mapping[str, str]) -> None:
        given = {name: value for some in self.options for name, value in asdict(some).items() if value is not None}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        check_writable(self.path, "--out")
        self._clear_up()
        write_record(self.path / "run.json", {"key": self.key, "parts": dict(parts)})
        write_text(self.path / "options.yaml", yaml.safe_dump(plain, sort_keys=False))

    def _check_nothing_needed_is_removed(self) -> None:
        values = (value for some in self.options for value in asdict(some).values())
        paths: Iterable[Path] = (Path(value) for value in values if isinstance(value, (str, Path)))
        out = self.path.resolve()
        inside = [path for path in paths if out in path.resolve().parents and path.exists()]
        if inside:
            raise ValueError(f"--fresh would remove {inside[0]}, which this run needs: choose another --out")
