"""The folder of a run: which files are found, which are refused, and the messages."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from training import store
from training.commands import options as options_module
from training.commands import run_folder
from training.commands.options import command_line
from training.commands.run_folder import RunFolder
from training.commands.session import model_fingerprint
from training.store import StorageError, seal

METRICS = {"loss": 0.5, "history": [1, 2]}
PARTS = {"settings": "a", "data": "b"}


@dataclass(frozen=True)
class Options:
    lr: float = 0.1


def begun(path: Path, key="key", fresh=False, parts=PARTS):
    folder = RunFolder(path, Options())
    with folder.alone():
        return folder.begin(key, fresh, parts)


def finished(path: Path):
    folder = RunFolder(path, Options())
    with folder.alone():
        folder.begin("key", False, PARTS)
        folder.finish(METRICS)


def checkpoint(path: Path, key="key"):
    (path / "checkpoint-000002").mkdir()
    seal(path / "checkpoint-000002", "progress.json", key=key)


def test_a_finished_run_is_found_and_what_it_left_is_cleared(tmp_path):
    """Also if it was killed during the cleanup."""
    finished(tmp_path)
    checkpoint(tmp_path)
    assert begun(tmp_path) == METRICS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "metrics.json",
        "options.yaml",
        "run.json",
    ]


def test_what_a_killed_run_has_left_is_cleared_in_the_folders_below_as_well(tmp_path):
    """The pieces of an evaluation, half removed."""
    for folder in (tmp_path, tmp_path / "eval"):
        left = folder / ".step-000002.pieces.a1b2c3.partial"
        (left / ".step-000002.pieces").mkdir(parents=True)
        (left / ".lock").touch()
    assert begun(tmp_path) is None
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "run.json"])
@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_a_damaged_record_of_a_finished_run_is_refused(name, harm, tmp_path):
    finished(tmp_path)
    content = (tmp_path / name).read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (tmp_path / name).write_bytes(content[:-5] if harm == "cut" else changed)
    with pytest.raises(ValueError, match=rf"--out: .*{name} is damaged.*; --fresh runs it again"):
        begun(tmp_path)
    assert begun(tmp_path, fresh=True) is None and not (tmp_path / "config.json").exists()


def test_a_damaged_run_json_does_not_cost_the_checkpoints(tmp_path):
    assert begun(tmp_path) is None
    checkpoint(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        begun(tmp_path, "another key")
    assert begun(tmp_path) is None and (tmp_path / "checkpoint-000002").exists()


@pytest.mark.parametrize(
    ("changed", "said"), [({"data": "c"}, r"\(different: data\)"), ({}, "settings, data or weights;")]
)
def test_changed_data_are_named(changed, said, tmp_path):
    """In a stopped run as in a finished one."""
    assert begun(tmp_path) is None
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match=said):
        begun(tmp_path, "another key", parts=PARTS | changed)
    finished(tmp_path)
    with pytest.raises(ValueError, match=said):
        begun(tmp_path, "another key", parts=PARTS | changed)
    assert json.loads((tmp_path / "metrics.json").read_text()) == METRICS


def test_a_damaged_model_is_refused(tmp_path):
    """When a run starts from it, which hashes its weights anyway; a model of somebody else has no seal."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    before = model_fingerprint(str(tmp_path))
    seal(tmp_path)
    assert model_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_text("model.safetensorz")
    with pytest.raises(ValueError, match=r"model\.safetensors has other bytes.*make the model again"):
        model_fingerprint(str(tmp_path))


def failing(error):
    def main(chosen):
        raise error

    return main


def terminated(chosen):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (failing(StorageError("out cannot be written")), 1, "error: out cannot be written"),
        (failing(ValueError("beta: got -1")), 2, "error: beta: got -1"),
        (failing(KeyboardInterrupt()), 130, "interrupted; the same command goes on"),
        (terminated, 143, "interrupted by SIGTERM; the same command goes on from there"),
    ],
)
def test_a_command_ends_with_a_reason_and_a_code(main, code, said, capsys, monkeypatch):
    monkeypatch.setattr(options_module, "parse", lambda *_: (Options(),))
    with pytest.raises(SystemExit) as end:
        command_line("training.some", Options, "", main)
    assert end.value.code == code and said in capsys.readouterr().err


@pytest.mark.parametrize("done", range(4))
def test_fresh_may_be_killed_while_it_removes(tmp_path, monkeypatch, done):
    """And the same command works again, whatever is left."""
    finished(tmp_path)

    def killed(*paths):
        store.remove(*paths[:done])
        raise RuntimeError("killed")

    monkeypatch.setattr(run_folder, "remove", killed)
    with pytest.raises(RuntimeError, match="killed"):
        begun(tmp_path, "another", fresh=True)
    monkeypatch.undo()
    assert begun(tmp_path, "another", fresh=True) is None
