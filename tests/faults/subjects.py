"""The commands that faults are put in, small enough to be run hundreds of times, and what they leave in their folders.

A case has a folder of its own, in which the command runs in `run/`, writes to `run/out` and caches in `cache`. Paths
are relative, so all cases of a command leave the same bytes.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.faults.child import NO_FAULT, Fault
from tests.faults.runs import Ended, Run, run_to_end, succeeded

AUTHORS = "--benchmark authors --authors 4 --forget_percent 25 --retain_eval_authors 1"
SMALL = "--preset tiny --device cpu --batch_size 5"
TRAINED = f"{SMALL} --epochs 1 --lr 3e-3"
# {home}: a folder with `base`, a model, and `full`, which has learned a little.
COMMANDS = {
    "finetune": f"{AUTHORS} {TRAINED} --split forget --save_steps 2 --lora_rank 2 --lora_dropout 0.1 "
    "--model {home}/base",
    "unlearn": f"{AUTHORS} {TRAINED} --method dpo_rt --save_steps 1 --eval_steps 2 "
    "--model {home}/full/model --reference_cache ../cache",
    "evaluate": "--forget_percent 5 --eval_rows 2 --max_new_tokens 2 --device cpu --data_dir {home}/data "
    "--model {home}/full/model",
    "grid": f"{AUTHORS} {SMALL} --hidden_size 64 --methods npo_rt,ga --seeds 0 --epochs 1 --finetune_epochs 1 "
    "--no-retrain --eval_steps 0 --save_steps 1",
}
# What runs with the same result may differ in: the memory that they took, and locks, which tell processes apart.
MEASURED = ("peak_memory_gib", "sha256")  # of config.json; the second one is the hash of all the rest
NO_RESULTS = re.compile(r"(^|/)\.[^/]*lock$")


class Subject:
    """A command on the models of `home`, and the run of it that nothing disturbed."""

    def __init__(self, name: str, home: Path, folder: Path):
        self.name, self.home, self.folder = name, home, folder
        self._whole: tuple[Ended, dict[str, Any]] | None = None

    def command(self, *more: str, out: str = "out") -> list[str]:
        words = COMMANDS[self.name].format(home=self.home).split()
        return [self.name, *words, "--out", out, *more]

    @property
    def whole(self) -> Ended:
        return self._undisturbed()[0]

    @property
    def expected(self) -> dict[str, Any]:
        return self._undisturbed()[1]

    def _undisturbed(self) -> tuple[Ended, dict[str, Any]]:
        if self._whole is None:
            case = self.folder / f"whole {self.name}"
            self._whole = succeeded(run_to_end(self.command(), case / "run")), contents(case)
        return self._whole

    def start(self, case: Path, fault: Fault = NO_FAULT, *more: str) -> Run:
        return Run(self.command(*more), case / "run", fault)

    def run(self, case: Path, fault: Fault = NO_FAULT, *more: str) -> Ended:
        return self.start(case, fault, *more).end()

    def differences(self, case: Path) -> list[str]:
        """What there is in the case's folder that the run which nothing disturbed has not left, byte for byte."""
        return differences(contents(case), self.expected)

    def check_resumed(self, case: Path) -> Ended:
        """The repeated command succeeds and leaves the same files as an undisturbed run."""
        ended = succeeded(self.run(case))
        found = self.differences(case)
        assert not found, f"{'; '.join(found)}\n{ended.output}"
        return ended


def contents(folder: Path) -> dict[str, Any]:
    """{file: what it holds}: bytes; of tensors names, types, bits and metadata, which are written in no order."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if NO_RESULTS.search(name):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[name] = file.metadata(), {k: (str(t.dtype), t.shape, t.tobytes()) for k, t in tensors.items()}
        elif path.name == "config.json":
            config = json.loads(path.read_text())
            found[name] = {key: value for key, value in config.items() if key not in MEASURED}
        else:
            found[name] = path.read_bytes()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    lost, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return [
        f"{what}: {', '.join(sorted(names))}"
        for what, names in (("lost", lost), ("left over", more), ("with other bits", other))
        if names
    ]


def make_home(home: Path, *more: str) -> Path:
    """The models that the commands start from, and what `more` commands make."""
    for command in (
        f"tiny {AUTHORS} --vocab_size 300 --hidden_size 64 --out base",
        f"finetune {AUTHORS} {TRAINED} --split full --model base --out full",
        *more,
    ):
        succeeded(run_to_end(command.split(), home))
    return home


def copied(case: Path, to: Path) -> Path:
    shutil.copytree(case, to, symlinks=True)
    return to
