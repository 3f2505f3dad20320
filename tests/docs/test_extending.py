"""docs/extending.md followed literally, in copies of the repository.

Each recipe's checks pass once its steps are done, and fail with the message on the page if a step is left out.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs import recipes

ROOT = Path(__file__).parents[2]
RECIPES = {recipe.heading: recipe for recipe in recipes.read(ROOT / "docs" / "extending.md")}
LONG = os.environ.get("NPO_RECIPES") == "1"
COPIED = ("csrc_triton", "npo_kernels", "training", "bench", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("*.png", "*.jsonl", "metrics.json", "real", "h100_2", "h200_*")
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
# `python -m bench tune --write` on a GPU that is made up: of two tiles the last is the fastest
TUNING = """
    import argparse
    import torch
    from bench import sweeps, tune
    from bench.cases import Case, Head
    from csrc_triton.tiles import Tile
    from npo_kernels.backends.tiles import Row

    def turns(runs, *_, **__):
        return sweeps.Times({}, {tile: 2.0 - number / 10 for number, tile in enumerate(runs)}, 1)

    torch.cuda.is_available = lambda: True
    tune.row_of = lambda _: Row("gfx1201", "gfx1201")
    tune.batch_of = lambda *_: Case("a", Head(2048, 8), ((0, 2),)).batch(torch.bfloat16, "cpu")
    tune.candidates = lambda *_: [Tile(64, 128, 64, 8, 8, 3)]
    tune.take_turns, tune.environment, tune.record = turns, lambda _: {}, lambda _: {"date": ""}
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    raise SystemExit(tune.main(parser.parse_args(["--H", "2048", "--write"])))
"""


def copy_to(folder: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=LEFT_OUT)
        else:
            shutil.copy(source, folder)
    return folder


def run(command: list[str], root: Path) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=root, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def shell(commands: str, root: Path) -> tuple[int, str]:
    return run(["bash", "-e", "-c", commands], root)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_that_is_followed_passes_its_checks(heading, tmp_path):
    recipe, root = RECIPES[heading], copy_to(tmp_path)
    recipes.follow(recipe, root)
    if "tiles" in heading:
        status, said = run([sys.executable, "-c", textwrap.dedent(TUNING)], root)
        table = (root / "csrc_triton" / "tiles.py").read_text()
        assert status == 0, said
        assert '    ("gfx1201", 16, 2048): Tile(64, 128, 64, 8, 8, 3),\n' in table
        assert '    ("gfx1201", 16, 2048): "bench/results/tune_gfx1201_bfloat16.json",\n' in table
    for commands in recipe.checks(long=LONG):
        status, said = shell(commands, root)
        assert status == 0, f"{commands}\n{said}"


COMPLAINTS = [(heading, block) for heading, recipe in RECIPES.items() for block in recipe.complaints]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(not LONG, reason="in `make recipes` only: set NPO_RECIPES=1")
@pytest.mark.parametrize(("heading", "complaint"), COMPLAINTS, ids=[block.title for _, block in COMPLAINTS])
def test_a_step_that_is_forgotten_is_named(heading, complaint, tmp_path):
    recipe, root = RECIPES[heading], copy_to(tmp_path)
    recipes.follow(recipe, root, without=complaint.file)
    status, said = shell(recipe.checks()[-1], root)
    assert status != 0 and complaint.text.strip() in said, said


def test_every_recipe_has_changes_and_a_check_that_python_blocks_do_not_shadow():
    assert [int(heading.split(".")[0]) for heading in RECIPES] == [1, 2, 3, 4, 5]
    for recipe in RECIPES.values():
        assert recipe.changes and recipe.checks()
        assert all(block.language in ("python", "diff") for block in recipe.changes)
        assert {block.file for block in recipe.complaints} <= {block.file for block in recipe.changes}
    text = (ROOT / "docs" / "extending.md").read_text()
    assert len(re.findall(r"^```\w+ title=", text, re.MULTILINE)) == sum(len(r.blocks) for r in RECIPES.values())


def test_a_diff_finds_its_place_once_or_says_so():
    block = recipes.Block("diff", "a.py", " b\n+c\n@@\n-d\n+e\n")
    assert recipes.patched("a\nb\nd\n", block) == "a\nb\nc\ne\n"
    for source in ("a\nd\n", "b\na\nb\nd\n"):
        with pytest.raises(AssertionError, match="expected these lines once, found them"):
            recipes.patched(source, block)


def test_the_line_before_a_block_names_its_file():
    """Titles are shown on the site, not where the page is read as plain Markdown."""
    text = (ROOT / "docs" / "extending.md").read_text()
    for found in recipes.BLOCK.finditer(text):
        block = recipes.Block(*found.groups())
        paragraph = text[: found.start()].rstrip("\n").rpartition("\n\n")[2]
        expected = "Check" if block.title in recipes.CHECKS else f"`{block.file}`"
        assert expected in paragraph, f"{block.title}: {paragraph}"
        assert not block.title.endswith(recipes.APPEND) or "the end of" in paragraph, f"{block.title}: {paragraph}"
