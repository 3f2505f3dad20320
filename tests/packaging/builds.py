"""A source distribution and a wheel of this tree, built without network from a copy."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# in the root; so is whatever begins with a dot
LEFT_BEHIND = {"build", "dist", "shared", "data", "runs", "outputs"}


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def not_in_a_build(folder: str, names: list[str]) -> set[str]:
    if Path(folder) != ROOT:
        return {"__pycache__"}
    return {name for name in names if name[0] == "." or name in LEFT_BEHIND or name.endswith(".egg-info")}


def build_sdist(folder: Path) -> Path:
    """From a copy: a build leaves `build/` behind, and the next one takes stale files from there."""
    if not all(map(importlib.util.find_spec, ("pip", "setuptools"))):
        pytest.skip("building needs pip and setuptools")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=not_in_a_build)
    out = folder / "sdist"
    out.mkdir()
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_sdist({str(out)!r})", cwd=source)
    (built,) = out.glob("*.tar.gz")
    return built


def build_wheel(source: Path, folder: Path) -> Path:
    """Of a source distribution: what it lacks, the wheel lacks."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built
