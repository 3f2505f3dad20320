"""The source distribution of this tree, and its wheel, which works in an empty environment and from another folder."""

import json
import os
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.packaging.builds import ROOT, build_sdist, build_wheel, run

# A user's first calls, for every implementation that runs without a GPU, against float64.
FIRST_CALL = """
import importlib.metadata, importlib.util, json, torch
import npo_kernels
from npo_kernels import fused_npo_loss

generator = torch.Generator().manual_seed(0)
def draw(*shape): return torch.randn(*shape, generator=generator, dtype=torch.float64)
hidden, weight = draw(2, 6, 16), draw(40, 16) / 4
labels = torch.randint(0, 40, (2, 6), generator=generator)
labels[:, :2] = -100
ref_logps = draw(2) - 15

def loss_and_gradients(impl, dtype):
    h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    loss = fused_npo_loss(h, w, labels, ref_logps=ref_logps.float(), impl=impl)
    loss.backward()
    return [x.detach().double() for x in (loss, h.grad, w.grad)]

def error(impl):  # the largest, relative to the largest entry
    pairs = zip(loss_and_gradients(impl, torch.float32), oracle, strict=True)
    return max(((got - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs)

oracle = loss_and_gradients("reference", torch.float64)
impls = ["torch"] + (["triton"] if importlib.util.find_spec("triton") else [])
print(json.dumps({
    "files": [npo_kernels.__file__, importlib.util.find_spec("csrc_triton").origin],
    "versions": [npo_kernels.__version__, importlib.metadata.version("npo-kernels")],
    "plain": error("reference"),
    "errors": {impl: error(impl) for impl in impls},
}))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build_sdist(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel and, after it on the path, the packages of this one
    (torch)."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Path files in a borrowed folder are not followed: an editable installation of this tree is out of reach.
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed))
    return interpreter


def test_the_source_distribution_holds_what_is_built_read_and_cited(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    top = {name.split("/")[0] for name in names if name} - {"npo_kernels.egg-info", "PKG-INFO", "setup.cfg"}
    documents = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "SECURITY.md"}
    assert top == documents | {"pyproject.toml", "MANIFEST.in", "npo_kernels", "csrc_triton"}
    for package in ("npo_kernels", "csrc_triton"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert here <= names
    assert "npo_kernels/py.typed" in names


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in modules} == {"npo_kernels", "csrc_triton"}
    assert "npo_kernels/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for package in ("npo_kernels", "csrc_triton"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert here == {name for name in modules if name.startswith(package + "/") and name.endswith(".py")}


def test_the_wheel_needs_only_torch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in required] == ["torch"]
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra:")}
    assert extras >= {"hf", "train", "bench", "triton", "flash", "hub", "real", "liger", "quant"}
    assert "License-Expression: Apache-2.0" in lines


def test_an_installed_wheel_works_from_another_folder(python, tmp_path):
    # -I: no PYTHONPATH, no user packages, no current folder. The interpreter, because there may be no GPU.
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    answer = json.loads(run(python, "-I", "-c", FIRST_CALL, cwd=tmp_path, env=environment))
    home = python.parents[1]
    assert [Path(file).is_relative_to(home) for file in answer["files"]] == [True, True]
    assert answer["versions"][0] == answer["versions"][1]
    for impl, error in answer["errors"].items():
        # float32 against float64: a few times what the plain float32 computation loses, no more
        assert error <= 8 * answer["plain"] + 1e-6, (impl, answer)


def test_the_report_runs_as_installed(python, tmp_path):
    assert json.loads(run(python, "-I", "-m", "npo_kernels.env", "--json", cwd=tmp_path))["impl auto"]
