"""The folder of a run: what it holds, how a run begins and how it ends.

run.json has a key of all that the result depends on, options.yaml the options (`--config` takes it). config.json
(settings without paths, versions) is written last: with it the run is finished, and the same command finds it. Another
command on the same folder is refused, whether or not the run is finished, until --fresh removes what the run has
written.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from training import distributed
from training.store import finished, remove, write_json, write_text
from training.versions import versions

# What runs write into their folders.
RUN_FILES = (
    *("run.json", "options.yaml", "config.json", "metrics.json", "report.md", "eval_log_aggregated.json"),
    *("figure.png", "beta.png", "collapse.png", "lengths.png", "model", "adapter", "eval", "reference"),
    *("checkpoint-*", ".*.partial", ".*.pieces", "*_EVAL.json", "*_SUMMARY.json"),
)
# Options that are paths, or that say nothing of the result: they are not in config.json.
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
    """Whether it names a data set of the hub, or the generated one."""
    named = isinstance(data_dir, str) and re.fullmatch(r"[\w-]+(/[\w.-]+)?", data_dir)
    return bool(named) and not Path(str(data_dir)).exists()


def model_name(model: str | Path) -> str:
    """A hub name or a folder as reports show it; `runs/full/model` is `full`."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


class RunFolder:
    """`path`, for the run of these options."""

    def __init__(self, path: Path, *options: Any):
        self.path, self.options = path, options
        self.key = ""

    @property
    def settings(self) -> dict[str, Any]:
        return public(*self.options)

    def begin(self, key: str, fresh: bool = False) -> dict[str, Any] | None:
        """metrics.json of this very run if it is finished; None: it is to be run, from its checkpoint if there is one.

        `fresh` removes what another run left, finished or not, and this run if it is finished.

        Raises:
            ValueError: the folder holds another run or something that is no run, or `fresh` would remove what this one
                needs.
        """
        path, self.key = self.path, key
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path}: expected a folder, got a file")
        if (path / "config.json").exists() and not (path / "run.json").exists():
            raise ValueError(f"--out {path} holds a config.json that is of no run; choose another folder")
        complete = finished(path / "config.json", key) is not None
        left = (path / "config.json").exists() or any(path.glob("checkpoint-*"))
        another = left and finished(path / "run.json", key) is None
        distributed.wait()  # every process has looked before one writes
        if fresh and (complete or another):
            self._check_nothing_needed_is_removed()
            distributed.on_main(lambda: remove(*(file for name in RUN_FILES for file in path.glob(name))))
        elif complete:
            return json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        elif another:
            raise ValueError(
                f"--out {path} holds a run with other settings, data or weights; choose another folder, or remove it "
                "by --fresh"
            )
        distributed.on_main(self._write_options)
        return None

    def finish(self, metrics: dict[str, Any], **record: Any) -> dict[str, Any]:
        """Write metrics.json and config.json."""
        config = {"key": self.key, "settings": self.settings, "versions": versions(), **record}
        distributed.on_main(lambda: write_json(self.path / "metrics.json", metrics))
        distributed.on_main(lambda: write_json(self.path / "config.json", config))
        return metrics

    def _write_options(self) -> None:
        given = {name: value for some in self.options for name, value in asdict(some).items() if value is not None}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
        write_json(self.path / "run.json", {"key": self.key})
        write_text(self.path / "options.yaml", yaml.safe_dump(plain, sort_keys=False))

    def _check_nothing_needed_is_removed(self) -> None:
        values = (value for some in self.options for value in asdict(some).values())
        paths: Iterable[Path] = (Path(value) for value in values if isinstance(value, (str, Path)))
        out = self.path.resolve()
        inside = [path for path in paths if out in path.resolve().parents and path.exists()]
        if inside:
            raise ValueError(f"--fresh would remove {inside[0]}, which this run needs: choose another --out")
