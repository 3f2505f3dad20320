"""Links of the Markdown files of the repository: where they lead, and the anchors of a page."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.docs.blocks import ROOT

SKIPPED = {"build", "dist", "data", "shared", "runs", "outputs", "node_modules"}
HTML_LINK = re.compile(r"""<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=["']([^"'\s]+)""", re.I)
HTML_ANCHOR = re.compile(r"""\b(?:id|name)=["']([^"']+)["']""")


class Link(NamedTuple):
    line: int
    target: str


def pages(root: Path = ROOT) -> list[Path]:
    """All Markdown files but those of environments and of builds."""
    found = root.rglob("*.md")
    return sorted(page for page in found if not any(_left_out(part) for part in page.relative_to(root).parts))


def _left_out(part: str) -> bool:
    return part in SKIPPED or (part.startswith(".") and part != ".github")


def links(page: Path) -> Iterator[Link]:
    for block in _tokens(page):
        line = block.map[0] + 1 if block.map else 0
        if block.type == "html_block":
            yield from (Link(line, target) for target in HTML_LINK.findall(block.content))
        for token in block.children or []:
            if token.type == "html_inline":
                yield from (Link(line, target) for target in HTML_LINK.findall(token.content))
            for name in ("href", "src"):
                if token.attrGet(name):
                    yield Link(line, str(token.attrGet(name)))


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links that lead nowhere, to a file outside the repository, or to an anchor that the page has not."""
    wrong = []
    for line, target in links(page):
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if not path.exists() or not path.is_relative_to(root):
            wrong.append(f"{page.relative_to(root)}:{line}: no file {target}")
        elif parts.fragment and path.suffix == ".md" and unquote(parts.fragment) not in anchors(path):
            wrong.append(f"{page.relative_to(root)}:{line}: no heading {target}")
    return wrong


@cache
def anchors(page: Path) -> frozenset[str]:
    """As code forges and MkDocs derive them from the headings, and those given in HTML."""
    found, seen = set(), Counter()
    tokens = _tokens(page)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(t.content for t in inline.children or [] if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return frozenset(found | set(HTML_ANCHOR.findall(page.read_text(encoding="utf-8"))))


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
