"""constraints.txt, constraints-oldest.txt and pyproject.toml agree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


def pins(file: str) -> dict[str, str]:
    """The exact version of every package in a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line[:1] not in ("", "#")]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
    pinned = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}
    assert len(pinned) == len(requirements)
    return pinned


def direct_dependencies() -> list[Requirement]:
    """Dependencies of the package and of its `dev` extra; a name in several extras occurs several times."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, seen = ["dev"], set()
    wanted = [Requirement(line) for line in project["dependencies"]]
    while pending:  # an extra may name other extras of this project
        extra = pending.pop()
        seen.add(extra)
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == project["name"]:
                pending += requirement.extras - seen
            else:
                wanted.append(requirement)
    assert {"torch", "triton"} <= {requirement.name for requirement in wanted}
    return wanted


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_the_constraints_pin_whatever_make_installs(file):
    """Every direct dependency of the `dev` extra has one exact pin, inside the range of pyproject.toml."""
    pinned = pins(file)
    for requirement in direct_dependencies():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_oldest_set_has_the_lower_bounds(name):
    (requirement,) = (r for r in direct_dependencies() if r.name == name)
    (bound,) = (s.version for s in requirement.specifier if s.operator == ">=")
    assert Version(pins("constraints-oldest.txt")[name]) == Version(bound)


def test_the_lock_has_the_versions_of_the_constraints_and_a_hash_of_each():
    """requirements-ci.txt, of `make lock`."""
    blocks = re.sub(r"\s*\\\n\s*", " ", (ROOT / "requirements-ci.txt").read_text()).splitlines()
    blocks = [block for block in blocks if block[:1] not in ("", "#")]
    locked = {}
    for block in blocks:
        requirement, *hashes = block.split(" --hash=sha256:")
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes), block[:60]
        name, version = re.split("==", requirement.split(";")[0].strip())
        locked[canonicalize_name(name)] = version.split("+")[0]  # torch's is +cpu
    assert locked == pins("constraints.txt")
