"""constraints.txt and pyproject.toml agree."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def test_the_constraints_pin_whatever_make_installs():
    """Every direct dependency of the `dev` extra has one exact pin, inside the range of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line[:1] not in ("", "#")]
    pinned = {canonicalize_name(pin.name): pin.specifier for pin in pins}
    assert len(pinned) == len(pins) and all(str(pin.specifier).startswith("==") for pin in pins)

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
    for requirement in wanted:
        version = str(pinned[canonicalize_name(requirement.name)]).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} against the pin {version}"
