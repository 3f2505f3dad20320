"""Checkpoints: the whole state of a run after a step, without pickle. A damaged checkpoint is not used.

`checkpoint-STEP` has the trained weights and the optimiser's state (safetensors), the states of the random generators
of each process (safetensors), numbers.json (the schedule and what else a method counts), and progress.json with the
run's key, its history, and the sha256 of every file. With FSDP and DeepSpeed, weights and optimizer are sharded, and
saved by accelerate in their own formats. Those contain pickles: never load them from a source that you do not trust.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import distributed
from training.random_states import RandomStates
from training.store import DamagedError, StorageError, check_seal, remove, renamed_when_done, seal
from training.trainer import Trainer

PROGRESS = "progress.json"
MODEL, OPTIMIZER, NUMBERS = "model.safetensors", "optimizer.safetensors", "numbers.json"


class Checkpoints:
    """The two newest checkpoints of a run in `folder`. If one is damaged, the other is used."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key

    def save(self, trainer: Trainer, step: int, record: Any) -> None:
        """StorageError if there is no space for it; the previous checkpoint is kept."""
        final = self.folder / f"checkpoint-{step:06d}"
        try:
            with ExitStack() as stack:
                private = final
                if distributed.is_main():
                    remove(*[path for path in self._all() if path != final][:-1])  # room for the new one
                    private = stack.enter_context(renamed_when_done(final))
                    private.mkdir()
                private = distributed.from_main(private)
                save_state(trainer, private)
                distributed.wait()
                if distributed.is_main():
                    seal(private, PROGRESS, key=self.key, step=step, processes=distributed.count(), record=record)
        except StorageError as error:
            newest = [*map(_step, self._all())][-1:]
            before = f"the newest one is of step {newest[0]}" if newest else "there is none before it"
            raise StorageError(f"the checkpoint of step {step} was not saved, {before}: {error}") from error
        distributed.wait()

    def load(self, trainer: Trainer) -> tuple[int, Any, list[str]]:
        """(steps done, record, messages) of the newest intact checkpoint of this run; (0, None, []) without one.

        Damaged checkpoints are skipped, and removed if they are newer.

        Raises:
            DamagedError: there are checkpoints, and none is intact.
        """
        found, path, problems = self._newest() if distributed.is_main() else (None, None, [])
        found, path, problems = distributed.from_main((found, path, problems))
        if found is None or path is None:
            if problems:
                raise DamagedError(
                    f"no checkpoint in {self.folder} is whole ({'; '.join(problems)}); remove them, and the same "
                    "command starts again"
                )
            return 0, None, []
        notes = [f"{problem}; going on from {path.name}" for problem in problems]
        if found["processes"] != distributed.count():
            notes.append(
                f"{path.name} was saved by {found['processes']} processes, not {distributed.count()}: what is drawn at "
                "random, as in dropout, may differ"
            )
        load_state(trainer, path)
        distributed.wait()
        if distributed.is_main():
            remove(*(other for other in self._all() if _step(other) > _step(path)))
        return found["step"], found["record"], notes

    def exist(self) -> bool:
        return bool(self._all())

    def clear(self) -> None:
        distributed.on_main(lambda: remove(*self._all()))

    def _newest(self) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
        problems: list[str] = []
        for path in reversed(self._all()):
            try:
                found = check_seal(path, PROGRESS)
                if found is None:
                    raise DamagedError(f"{path} is damaged: {PROGRESS} is absent")
            except DamagedError as problem:
                problems.append(str(problem))
                continue
            if found["key"] == self.key:
                return found, path, problems
        return None, None, problems

    def _all(self) -> list[Path]:
        """By their steps: a name of seven digits is before one of six, and the clock may have been set back."""
        found = (path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
        return sorted(found, key=_step)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Save the state of all processes into a folder that they share."""
    if trainer.sharded:
        trainer.accelerator.save_state(str(folder))
    elif distributed.is_main():
        save_file({name: tensor.contiguous() for name, tensor in trainer.trained().items()}, folder / MODEL)
        _save_optimizer(trainer.optimizer.state_dict(), folder / OPTIMIZER)
    if distributed.is_main():
        (folder / NUMBERS).write_text(json.dumps(trainer.state_dicts()), encoding="utf-8")
    RandomStates.now(trainer.device).save(_random_file(folder))


def load_state(trainer: Trainer, folder: Path) -> None:
    """Restore what `save_state` saved, bit for bit. Additional processes keep their own random states."""
    if trainer.sharded:
        trainer.accelerator.load_state(str(folder))
    else:
        _load_weights(trainer.trained(), load_file(folder / MODEL), folder / MODEL)
        trainer.optimizer.load_state_dict(_loaded_optimizer(folder / OPTIMIZER))
    trainer.load_state_dicts(json.loads((folder / NUMBERS).read_text(encoding="utf-8")))
    if _random_file(folder).exists():
        RandomStates.load(_random_file(folder)).restore(trainer.device)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _random_file(folder: Path) -> Path:
    return folder / f"random-{distributed.index()}.safetensors"


@torch.no_grad()
def _load_weights(own: dict[str, Tensor], saved: dict[str, Tensor], path: Path) -> None:
    shapes, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, saved))
    if shapes != found:
        differ = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ValueError(f"{path}: expected the trained weights of this model, got others: {', '.join(differ[:3])}")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _save_optimizer(state: dict[str, Any], path: Path) -> None:
    """Tensors `PARAMETER.NAME`, and the settings of the groups as JSON in the header."""
    tensors = {f"{i}.{name}": value for i, values in state["state"].items() for name, value in values.items()}
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, path, {"groups": json.dumps(state["param_groups"])}
    )


def _loaded_optimizer(path: Path) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        groups = json.loads(file.metadata()["groups"])
        for full in file.keys():  # noqa: SIM118  # it is no dictionary
            number, name = full.split(".")
            state.setdefault(int(number), {})[name] = file.get_tensor(full).clone()  # not a view of the file
    for group in groups:
        group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": groups}
