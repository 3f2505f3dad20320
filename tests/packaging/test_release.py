"""What a release must agree on: version, tag, changelog, citation, recipe; and the pins of the commit hooks."""

from pathlib import Path

import pytest

from tests.packaging.test_constraints import pins
from tools import release

yaml = pytest.importorskip("yaml", reason="the train extra is not installed")
ROOT = Path(__file__).resolve().parents[2]
FILES = ("npo_kernels/__init__.py", "CITATION.cff", "recipe/recipe.yaml", "CHANGELOG.md")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that `tools.release` reads, of a version that is ready to be released."""
    for file in FILES:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    heading = (
        f"## [{release.version()}] - 2030-01-31\n\n### Added\n\n- A loss.\n\n## [0.0.1] - 2029-01-31\n\n- Older.\n"
    )
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n- Later.\n\n" + heading)
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_files_of_this_checkout_have_one_version():
    assert release.disagreements() == []


def test_a_checkout_that_is_ready_has_no_problems_and_its_notes(checkout):
    assert release.problems(checkout, f"v{release.version()}") == []
    assert release.notes(checkout) == "### Added\n\n- A loss."


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("CITATION.cff", "version: 0", "version: 9", "CITATION.cff: expected version"),
        ("recipe/recipe.yaml", '  version: "', '  version: "9', "recipe/recipe.yaml: expected version"),
        ("CHANGELOG.md", " - 2030-01-31", "", "CHANGELOG.md: expected a section"),
        ("CHANGELOG.md", "### Added\n\n- A loss.\n\n", "", "CHANGELOG.md: expected a section"),
        ("npo_kernels/__init__.py", '__version__ = "', '__version__ = "1', "tag: expected v1"),
    ],
)
def test_what_disagrees_is_named(checkout, file, old, new, line):
    tag = f"v{release.version()}"
    edit(checkout / file, old, new)
    assert any(found.startswith(line) for found in release.problems(checkout, tag)), release.problems(checkout, tag)


def test_a_file_without_a_version_is_named(checkout):
    edit(checkout / "CITATION.cff", "version: 0", "edition: 0")
    with pytest.raises(ValueError, match=r"CITATION\.cff: expected one match"):
        release.problems(checkout)


def test_the_command_says_no_with_its_exit_code(capsys):
    assert release.main(["check", "--tag", "v99.0.0"]) == 1
    assert "tag: expected v" in capsys.readouterr().err
    assert release.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == release.version()


def test_the_commit_hooks_have_the_versions_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    dependencies = [
        line for repo in hooks for hook in repo["hooks"] for line in hook.get("additional_dependencies", [])
    ]
    pinned = pins("constraints.txt")
    found = {line.partition("==")[0]: line.partition("==")[2] for line in dependencies}
    assert found["ruff"] == pinned["ruff"]
    assert [name for name, version in found.items() if pinned.get(name, version) != version] == []
