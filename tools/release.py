"""`python -m tools.release check [--tag v0.1.0]` and `python -m tools.release notes`: what a release must agree on.

`check`: CITATION.cff and recipe/recipe.yaml have the version of `npo_kernels.__version__`, CHANGELOG.md has a dated
section for it, and the tag, if one is given, is "v" followed by it. `notes` prints that section.
Only the standard library is needed: the release workflow runs this before it installs anything.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEXT = r"(?=^## |\Z)"


def found(root: Path, file: str, pattern: str) -> str:
    """The one match of `pattern` in a file of the checkout."""
    matches = re.findall(pattern, (root / file).read_text(encoding="utf-8"), re.MULTILINE)
    if len(matches) != 1:
        raise ValueError(f"{file}: expected one match of {pattern!r}, found {len(matches)}")
    return str(matches[0])


def version(root: Path = ROOT) -> str:
    """Of `npo_kernels/__init__.py`, where it is a literal."""
    return found(root, "npo_kernels/__init__.py", r'^__version__ = "([^"]+)"$')


def notes(root: Path = ROOT) -> str:
    """The section of CHANGELOG.md for this version, "" where it has none."""
    heading = rf"^## \[{re.escape(version(root))}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(heading + rf"(.*?){NEXT}", text, re.MULTILINE | re.DOTALL)
    return section.group(1).strip() if section else ""


def disagreements(root: Path = ROOT) -> list[str]:
    """Files whose version is not that of the package."""
    wanted = version(root)
    others = {
        "CITATION.cff": found(root, "CITATION.cff", r"^version: (\S+)$"),
        "recipe/recipe.yaml": found(root, "recipe/recipe.yaml", r'^  version: "([^"]+)"$'),
    }
    return [f"{file}: expected version {wanted}, got {got}" for file, got in others.items() if got != wanted]


def problems(root: Path = ROOT, tag: str | None = None) -> list[str]:
    """Everything that stands against releasing this checkout, a line each."""
    wanted = version(root)
    lines = disagreements(root)
    if tag is not None and tag != f"v{wanted}":
        lines.append(f"tag: expected v{wanted}, got {tag}")
    if not notes(root):
        lines.append(f"CHANGELOG.md: expected a section `## [{wanted}] - YYYY-MM-DD` with text")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description="Check a release, or print its notes.")
    parser.add_argument("action", choices=["check", "notes", "version"])
    parser.add_argument("--tag", help="the tag of the release, as v0.1.0")
    options = parser.parse_args(arguments)
    if options.action == "version":
        print(version())
    elif options.action == "notes":
        print(notes())
    else:
        lines = problems(tag=options.tag)
        print("\n".join(lines) or f"ready: {version()}", file=sys.stderr if lines else sys.stdout)
        return 1 if lines else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
