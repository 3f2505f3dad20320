"""Every relative link and anchor of every Markdown file leads somewhere. No external link is fetched."""

import re

import pytest

from tests.docs import links
from tests.docs.blocks import ROOT


def test_every_relative_link_resolves(tried):
    wrong, number = [], 0
    for page in links.pages():
        number += sum(1 for _ in links.links(page))
        wrong += links.broken(page)
    assert not wrong, "\n".join(wrong)
    assert number > 100
    tried("links of documents", number)


@pytest.mark.parametrize(
    "text",
    [
        "[a](missing.md)", "![a](missing.png)", "[a](#missing)", "[a](other.md#missing)", "| [a](missing.md) |\n|---|",
        "[a]\n\n[a]: missing.md", '<img src="missing.png">', 'text <a href="missing.md">a</a>', "[a](../outside.md)",
        "- list\n\n      code\n\n  [a](missing.md)",
    ],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_found(tmp_path, text):
    root = tmp_path / "repository"
    root.mkdir()
    (tmp_path / "outside.md").write_text("# Outside\n")
    (root / "other.md").write_text("# Other\n")
    (root / "page.md").write_text(f"# Page\n\n{text}\n")
    assert len(links.broken(root / "page.md", root)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[a](other.md#a-heading-with-code)",
        "[a](#page)",
        "[a](https://example.org/x)",
        "`[a](missing.md)`",
        "[a](folder)",
    ],
)
def test_other_links_are_left_alone(tmp_path, text):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.md").write_text("# Other\n\n## A heading, with `code`\n")
    (tmp_path / "page.md").write_text(f"# Page\n\n{text}\n")
    assert links.broken(tmp_path / "page.md", tmp_path) == []


def test_every_make_target_that_a_document_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", makefile, re.M)
    targets = set(phony[1].replace("\\\n", " ").split())
    named = {
        target
        for page in links.pages()
        for target in re.findall(r"(?:`|^ {4,}|^)make ([a-z][a-z-]+)", page.read_text(encoding="utf-8"), re.M)
    }
    assert len(named) > 10 and named <= targets, named - targets
