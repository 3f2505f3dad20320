"""Input files cannot execute code: no pickles, no code that comes with data, no shell, no paths that leave a folder."""

import ast
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import figures
from bench.records import record
from bench.wheels import compress, members
from training.loading import load_causal_lm, load_classifier, load_config, load_tokenizer
from training.reports import tables
from training.store import SEAL, DamagedError, check_seal, file_hash, seal, write_record

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("npo_kernels", "csrc_triton", "training", "bench", "examples", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load",
    "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "pandas.read_pickle",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
LOADERS = {"training/loading.py", "training/pretrained/models.py"}  # the second reads a file whose hash it knows


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def full_names(tree: ast.Module) -> dict[str, str]:
    """{name in this source: what it was imported as}"""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def found_in(source: str, file: str) -> list[str]:
    """The forbidden calls in a source file."""
    tree = ast.parse(source)
    found, imported = [], full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = dotted(node.func).partition(".")
        name = imported.get(first, first) + dot + rest
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CALLS or name.split(".")[-1] == "extractall":
            found.append(name)
        if name.split(".")[0] == "subprocess" and "shell" in given:
            found.append("shell")
        if name.endswith("from_pretrained") and file not in LOADERS:
            found.append(name)
        trusted = given.get("trust_remote_code")
        if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
            found.append("trust_remote_code")
    return found


def test_no_source_reads_pickles_or_runs_what_it_reads():
    assert len(SOURCES) > 200
    found = {file: found_in((ROOT / file).read_text(encoding="utf-8"), file) for file in SOURCES}
    assert not {file: some for file, some in found.items() if some}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from subprocess import run\nrun(line, shell=True)",
        "from os import system\nsystem(line)",
        "torch.hub.load(name)",
        "__import__(name)",
        "from joblib import load",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader)",
        "archive.extractall(folder)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name)",
        "f(trust_remote_code=options.trust)",
    ],
)
def test_what_is_looked_for_is_found(source):
    assert found_in(source, "training/any.py")


class Touches:
    """An object whose pickle runs a program that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_weights_in_a_pickle_are_refused_unread(model, tmp_path):
    load_causal_lm(model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Touches(tmp_path / "ran")}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected weights in safetensors, got pytorch_model.bin, a pickle.*save_pre"):
        load_causal_lm(model)
    with pytest.raises(ValueError, match="expected weights in safetensors"):
        load_classifier(model)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_refused_without_a_question(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    classes = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Tokenizer", None],
    }
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Config: ...\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes}))
    for load in (load_causal_lm, load_config, load_tokenizer):
        with pytest.raises(ValueError, match=r"brings code of its own .*not run here"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_not_there_is_named_and_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for name in (tmp_path / "nothing", "./nothing", "runs/nothing/model"):
        with pytest.raises(ValueError, match=r"nothing.*: no such folder; expected one with a model"):
            load_causal_lm(name)


SAID = "<script>alert(1)</script> [x](javascript:a) **b** `c` | d\n# e\r\x1b[2J\x9b0m\u202eabc"


def test_what_a_model_says_is_text_in_markdown():
    rows = [{"set": "forget", "question": SAID, "answer": SAID, "generation": SAID}]
    page = tables.samples({"before": rows, "after": rows})
    assert len(page.splitlines()) == 5  # no line of its own
    unescaped = page.replace(r"\\", "")
    for piece in ("<script", "[x]", "**b", "`c", "| d", "# e", "\x1b", "\x9b", "\u202e"):
        assert piece not in unescaped.replace(f"\\{piece[0]}", ""), piece
    assert r"\<script\>" in page and r"\x1b" in page


def test_what_a_model_says_does_not_move_the_cursor():
    assert tables.visible("a\tb\n\x1b[2J\x07\u202e\x9b é 😀") == "a\tb\n\\x1b[2J\\x07\\u202e\\x9b é 😀"


def test_an_archive_stays_in_its_folder(tmp_path):
    """The files of a wheel are read by name and written by no name of it; what we pack is unpacked with a filter."""
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("../../outside.py", "x")
    (found,) = members(wheel, ("*",))
    archive = tmp_path / "packed.tar.xz"
    compress([found], archive)
    with tarfile.open(archive) as file, pytest.raises(tarfile.OutsideDestinationError):
        file.extractall(tmp_path / "a" / "b", filter="data")
    assert not (tmp_path / "outside.py").exists()


@pytest.mark.parametrize("name", ["../outside", "model/../../outside", "/etc/hostname"])
def test_a_record_of_hashes_names_no_file_outside_of_its_folder(tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("x")
    seal(folder)
    assert check_seal(folder) == {"files": {}}
    write_record(folder / SEAL, {"files": {name: file_hash(outside)}})
    with pytest.raises(DamagedError, match="expected the names of files in it"):
        check_seal(folder)


def test_a_record_names_no_file_outside_of_the_folder(tmp_path, monkeypatch):
    """The names of figures come from the records."""
    written = []
    monkeypatch.setattr(figures, "_figure", lambda title, panels, path: written.append(path))
    size = {
        "suite": "../../x",
        "case": "R",
        "provider": "npo_kernels",
        "mode": "full",
        "what": "fwd_bwd",
        "dtype": "float32",
    }
    made = record("cpu", **size, metric="ms", value=1.0, p20=1.0, p80=1.0, reps=3) | {"device": "../../y"}
    figures.draw([made], tmp_path)
    assert written and all(path.resolve().parent == tmp_path.resolve() for path in written)
