"""Python code blocks of the Markdown pages, found by Sybil and run page by page.

What a page may use:

    ```python
    assert 1 + 1 == 2                          # runs; blocks of a page share one namespace, from top to bottom
    ```

    <!-- invisible-code-block: python
    import torch                               # runs, and is not shown
    -->

    <!-- skip: next "needs two processes" -->  # the next block does not run, for this reason
    <!-- skip: next if(condition, reason="...") -->

    ```python title="FILE"                     # a step of a recipe, for `tests.docs.recipes`: does not run here
    ```
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest

from sybil import Sybil
from sybil.document import Document
from sybil.evaluators.skip import Skipper
from sybil.example import NotEvaluated
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
LISTED = ["README.md", "CONTRIBUTING.md", "training/README.md", "docs/**/*.md"]
# Written without Sybil, so that a block that Sybil's parser misses is noticed.
SHOWN = re.compile(
    r"^[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*(?:```+|~~~+)[ \t]*\{?\.?(?:python|py|pycon|python3)\b(?! title=)", re.M | re.I
)
INVISIBLE = re.compile(r"^[ \t]*<!--+[ \t;]*invisible-code", re.M)


class Run(NamedTuple):
    """What became of the blocks of a page."""

    ran: int
    skipped: list[str]  # "line 12: reason"


def pages(root: Path = ROOT) -> list[Path]:
    return sorted(path for pattern in LISTED for path in root.glob(pattern))


def run(path: Path) -> Run:
    """Run the blocks of a page. What they print is dropped; their errors carry the page's own line numbers."""
    ran, skipped = 0, []
    for example in parse(path).examples():
        if isinstance(example.region.evaluator, Skipper):
            example.evaluate()
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                example.evaluate()
            ran += 1
        except SkipTest as reason:
            skipped.append(f"line {example.line}: {reason}")
        except NotEvaluated:
            skipped.append(f"line {example.line}: no reason")
    return Run(ran, skipped)


def parse(path: Path) -> Document:
    sybil = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(path.parent), filenames=[path.name])
    return sybil.parse(path)


def count(path: Path) -> int:
    """Python blocks of a page, visible and invisible, counted by regular expressions."""
    text = path.read_text(encoding="utf-8")
    return len(SHOWN.findall(text)) + len(INVISIBLE.findall(text))
