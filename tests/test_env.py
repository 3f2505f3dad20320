"""`python -m npo_kernels.env` must work even if nothing else on the machine does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import npo_kernels
from npo_kernels import env
from npo_kernels.backends import choose

ROOT = Path(__file__).resolve().parents[1]


def test_report_names_the_versions_that_are_imported_here():
    values = env.report()
    assert values["npo_kernels"] == npo_kernels.__version__
    assert values["torch"] == torch.__version__
    assert values["cuda runtime"] == torch.version.cuda
    assert len(values["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_json_and_text_say_the_same(capsys):
    env.main(["--json"])
    values = json.loads(capsys.readouterr().out)
    env.main([])
    lines = capsys.readouterr().out.splitlines()
    assert values == env.report()
    assert len(lines) == len(values) + max(0, len(values["gpus"]) - 1)
    for line, name in zip(lines, values, strict=False):
        assert line.startswith(name) or len(values["gpus"]) > 1


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"),
    [(False, True, "torch"), (False, False, "torch"), (True, False, "torch"), (True, True, "triton")],
)
def test_auto_needs_a_gpu_and_triton(monkeypatch, cuda, triton, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(choose, "HAS_TRITON", triton)
    assert env.auto_impl()[0] == expected


def test_two_gpus_take_two_lines():
    assert env.as_text({"gpus": ["a", "b"], "x": None, "on": True}).splitlines() == [
        "gpus  a",
        "gpus  b",
        "x     none",
        "on    on",
    ]


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True), ("true", True)])
def test_interpreter_switch(monkeypatch, value, expected):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert env.triton_interpreter() is expected


def test_no_optional_package_is_needed():
    """Run as a user would, with everything but torch made unimportable and every version unknown."""
    code = (
        "import sys, runpy, importlib.metadata as m\n"
        "def unknown(name): raise m.PackageNotFoundError(name)\n"
        "m.version = unknown\n"
        "for name in ('triton', 'transformers', 'accelerate', 'peft', 'datasets'): sys.modules[name] = None\n"
        "sys.argv = ['env', '--json']\n"
        "runpy.run_module('npo_kernels.env', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["triton"] is None and values["transformers"] is None
    assert values["impl auto"] == "torch"
