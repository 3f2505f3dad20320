"""The tables of docs/reports_*.md: every row has a thread. And every test that a page of docs/ names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("reports_*.md"))
THREAD = re.compile(r"\]\(https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull|discussions)/(\d+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
SAME = re.compile(r"the same\b")  # thread as in the row above


def rows(page: Path) -> list[str]:
    """Those of its tables, without their heads."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [row for row, below in zip(lines, [*lines[1:], ""], strict=True) if not {row[:4], below[:4]} & {"|---"}]


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_there_is_a_page():
    assert ROOT / "docs" / "reports_elsewhere.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_row_has_a_thread_and_a_test_that_exists(page, tried):
    threads = set()
    for row in rows(page):
        report = row.split("|")[1].strip()
        found, tests = THREAD.findall(report), TEST.findall(row.split("|")[-2])
        assert found or SAME.match(report), f"no thread: {row}"
        assert tests, f"no test: {row}"
        if not all(path.startswith("tests/gpu/") for path, _ in tests):
            threads.update(found)
    assert len(threads) > 10
    tried("reports of other projects", len(threads))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_test_that_is_named_exists(page):
    for path, name in TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file() and name in functions_of(ROOT / path), f"no such test: {path}::{name}"
