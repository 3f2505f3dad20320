"""Trackers of a run: TensorBoard, Weights & Biases, and the other trackers of accelerate.

    python -m training.unlearn ... --report_to tensorboard,wandb

docs/guides/logging.md explains every curve. Training gives the same bits with and without trackers. Only the main
process logs. A tracker that cannot start ends the command before the first step. If a tracker fails later, the reason
is printed at once and again at the end, and the run continues without it: metrics.json has the results in any case.

A resumed run continues its curves. TensorBoard hides what was logged after the checkpoint (`purge_step`). Weights &
Biases gets the id of the run, which trackers.json keeps.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from training import distributed
from training.random_states import kept
from training.store import read_record, remove, write_record

PROJECT = "unlearning"  # of Weights & Biases and others, unless WANDB_PROJECT is set
RUN_FILE = "trackers.json"
PACKAGES = {"comet_ml": "comet-ml"}  # if it differs from the name of the tracker
EVALUATED = ("forget", "retain", "ra", "wf", "holdout")  # sets: forget_prob is shown as forget/prob
NOT_SHOWN = ("step", "train_loss", "retain_weight")  # of an evaluation: logged with every step, or not a metric

Say = Callable[[str], None]


def trackers_of(report_to: str | None) -> list[str]:
    """The names in --report_to. ValueError if one is unknown or its package is not installed."""
    names = [name.strip() for name in (report_to or "none").split(",")]
    names = [name for name in dict.fromkeys(names) if name not in ("", "none")]
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"--report_to: expected none, or some of {', '.join(known)}, got {name!r}")
        if name not in installed:
            raise ValueError(
                f"--report_to {name}: the package is not installed; pip install {PACKAGES.get(name, name)}"
            )
    return names


def evaluation_names(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under their names in a tracker: forget/prob, retain/rougeL, eval/forget_quality.

    The bounds of confidence intervals are left out; metrics.json has them.
    """
    found = {}
    for key, value in summary.items():
        if isinstance(value, (int, float)) and key not in NOT_SHOWN and not key.endswith(("_low", "_high")):
            group, _, rest = key.partition("_")
            of_set = group in EVALUATED and rest and key != "forget_quality"
            found["train/epoch" if key == "epoch" else f"{group}/{rest}" if of_set else f"eval/{key}"] = value
    return found


class Tracking:
    """The trackers of one run, from `start` to `finish`.

    Args:
        report_to: names, separated by commas.
        folder: of the run; the trackers write their files there.
        name: of the run, for Weights & Biases.
        settings: shown with the run.
        device: its random generator is not changed by a tracker.
        say: prints a line.
    """

    def __init__(
        self,
        report_to: str | None,
        folder: Path,
        name: str = "",
        settings: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        say: Say = print,
    ):
        self.names, self.folder, self.name, self.say = trackers_of(report_to), folder, name, say
        self.settings = {key: _plain(value) for key, value in (settings or {}).items() if value is not None}
        self.device = device or torch.device("cpu")
        self.running: list[GeneralTracker] = []
        self.stopped: list[str] = []  # messages about trackers that failed

    def __bool__(self) -> bool:
        return bool(self.names)

    def start(self, first_step: int) -> None:
        """Start, or resume after `first_step` steps. ValueError if a tracker cannot start."""
        problem = ""
        if self.names and distributed.is_main():
            with kept(self.device):
                problem = self._started(first_step)
        if self.names and (problem := distributed.from_main(problem)):
            raise ValueError(problem)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(dict(values), step=step), f"step {step}")

    def finish(self, failed: bool = False) -> None:
        """Close the trackers. `failed`: Weights & Biases marks the run as failed."""

        def close(tracker: GeneralTracker) -> None:
            if tracker.name == "wandb":
                tracker.tracker.finish(exit_code=int(failed))
            else:
                tracker.finish()

        self._each(close, "the end")
        for problem in self.stopped:
            self.say(problem)
        self.running, self.stopped = [], []

    def _started(self, first_step: int) -> str:
        """An error message if a tracker cannot start, else ""."""
        run = self._run_record(first_step)
        for name in self.names:
            try:
                tracker = _tracker(name, self.folder, self.name, run, first_step)
                tracker.start()
                self.running.append(tracker)
                self._store_settings(tracker, first_step)
            except Exception as error:  # the code of a tracker may raise anything
                self.finish(failed=True)
                advice = "; without a network: WANDB_MODE=offline" if name == "wandb" else ""
                return (
                    f"--report_to {name} cannot start: {_reason(error)}{advice}; or leave it out, which does not "
                    "change the results"
                )
        return ""

    def _run_record(self, first_step: int) -> str:
        """The id of the run. A resumed run keeps its id; a run from the beginning gets a new one."""
        path = self.folder / RUN_FILE
        if first_step == 0 and (self.folder / "tensorboard").exists():
            remove(self.folder / "tensorboard")  # left by this run, killed before its first checkpoint
        if first_step == 0 or not path.exists():  # or resumed, but not tracked before
            write_record(path, {"run": secrets.token_hex(8)})
        return str((read_record(path) or {})["run"])

    def _store_settings(self, tracker: GeneralTracker, first_step: int) -> None:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(self.settings)
        elif first_step == 0:  # as text: accelerate's way adds another run to TensorBoard at every start
            lines = [f"    {name}: {value}" for name, value in self.settings.items()]
            tracker.log({"settings": "\n".join(lines)}, step=0)

    def _each(self, act: Callable[[GeneralTracker], None], when: str) -> None:
        for tracker in list(self.running):
            try:
                with kept(self.device):
                    act(tracker)
            except Exception as error:
                self.running.remove(tracker)
                problem = f"{tracker.name} stopped at {when}: {_reason(error)}; training continues without it"
                self.stopped.append(problem)
                self.say(problem)


def _tracker(name: str, folder: Path, label: str, run: str, first_step: int) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    if name == "tensorboard":
        return kind(name, logging_dir=folder, purge_step=first_step + 1)
    if name == "wandb":
        place = {} if "WANDB_DIR" in os.environ else {"dir": folder}
        return kind(project, id=run, name=label or None, resume="allow", **place)
    return kind(project, folder) if kind.requires_logging_directory else kind(project)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
