"""The conda recipe has the version, the dependencies and the licence of pyproject.toml."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.release import version

yaml = pytest.importorskip("yaml", reason="the train extra is not installed")
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPE = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
CONDA_NAMES = {"torch": "pytorch"}


def conda(lines: list[str]) -> set[str]:
    requirements = map(Requirement, lines)
    return {f"{CONDA_NAMES.get(r.name, r.name)} {r.specifier}" for r in requirements}


def test_its_requirements_are_those_of_the_package():
    python = "python " + PROJECT["project"]["requires-python"]
    assert set(RECIPE["requirements"]["run"]) == {python} | conda(PROJECT["project"]["dependencies"])
    assert set(RECIPE["requirements"]["host"]) == {python, "pip"} | conda(PROJECT["build-system"]["requires"])


def test_its_version_name_and_licence_are_those_of_the_package():
    assert RECIPE["context"] == {"name": PROJECT["project"]["name"], "version": version()}
    assert RECIPE["about"]["license"] == PROJECT["project"]["license"]
    assert (ROOT / RECIPE["about"]["license_file"]).exists()


def test_what_it_imports_is_installed():
    for test in RECIPE["tests"]:
        for module in test.get("python", {}).get("imports", []):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), module


def test_rattler_build_renders_it():
    if importlib.util.find_spec("rattler_build") is None:
        pytest.skip("py-rattler-build is not installed")
    from rattler_build import Stage0Recipe, VariantConfig

    (variant,) = Stage0Recipe.from_file(ROOT / "recipe" / "recipe.yaml").render(VariantConfig())
    assert "npo-kernels" in str(variant.recipe.package.name)
