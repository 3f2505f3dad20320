"""The extras of pyproject.toml: every one that is named in a message or a document exists."""

import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# pip install 'npo-kernels[train,hub]', .[dev], "the hf extra", the extra `hub`
INSTALLED = re.compile(r"(?:npo-kernels|['\" ]\.)\[([a-z, -]+)\]")
NAMED = re.compile(r"\bthe `?([a-z]+)`? extra\b|\bthe extra `([a-z]+)`")
HERE = Path(__file__).relative_to(ROOT).as_posix()


def texts() -> dict[str, str]:
    """Every file of the project that a reader or a program reads; a changelog speaks of the past as well."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() if listed.returncode == 0 else []
    if not names:  # not a checkout of git
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if ".venv" not in p.as_posix()]
    kinds = (".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".ipynb", "Makefile", ".ci/run")
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in names
        if name.endswith(kinds)
        and name not in (HERE, "CHANGELOG.md", "requirements-ci.txt")
        and (ROOT / name).is_file()
    }


def named(text: str) -> set[str]:
    found = {extra.strip() for match in INSTALLED.findall(text) for extra in match.split(",")}
    return found | {a or b for a, b in NAMED.findall(text)}


def test_every_extra_that_is_named_exists():
    files = {name: named(text) for name, text in texts().items()}
    assert {name: extras - EXTRAS.keys() for name, extras in files.items() if extras - EXTRAS.keys()} == {}
    assert set().union(*files.values()) >= {"hf", "train", "hub", "real", "dev"}


def test_named_finds_all_ways_of_naming_one():
    assert named("pip install 'npo-kernels[train,hub]'") == {"train", "hub"}
    assert named("pip install -e '.[dev]' and x[test]") == {"dev"}
    assert named("the hf extra, the `real` extra and the extra `flash`; an extra line") == {"hf", "real", "flash"}


def test_an_extra_names_extras_that_exist():
    inner = [Requirement(line) for lines in EXTRAS.values() for line in lines if line.startswith("npo-kernels")]
    assert inner
    assert [r for r in inner if r.extras - EXTRAS.keys()] == []


def test_the_documented_extras_are_there():
    assert {"hf", "train", "bench", "triton"} <= EXTRAS.keys()
    assert "training" not in EXTRAS
