"""The recipes of docs/extending.md as they are written: blocks with a title, by section.

```python title="FILE"             the whole of a new file
```python title="FILE (append)"    more lines at its end, after two empty ones
```diff title="FILE"               lines to add and to take away; "@@" between places; no line numbers
```bash title="check"              commands that have to pass; "long check": in `make recipes` only
```text title="without FILE"       what the commands print where the changes of that file are left out
"""

import re
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
APPEND = " (append)"
WITHOUT = "without "
CHECKS = ("check", "long check")


class Block(NamedTuple):
    language: str
    title: str
    text: str

    @property
    def file(self) -> str:
        return self.title.removesuffix(APPEND).removeprefix(WITHOUT)


class Recipe(NamedTuple):
    """One section of the page."""

    heading: str
    blocks: list[Block]

    @property
    def changes(self) -> list[Block]:
        return [b for b in self.blocks if b.title not in CHECKS and not b.title.startswith(WITHOUT)]

    def checks(self, long: bool = False) -> list[str]:
        return [b.text for b in self.blocks if b.title in CHECKS[: 1 + long]]

    @property
    def complaints(self) -> list[Block]:
        return [b for b in self.blocks if b.title.startswith(WITHOUT)]


def read(page: Path) -> list[Recipe]:
    _, *parts = re.split(r"^## (?=\d)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [Recipe(part.partition("\n")[0], [Block(*found) for found in BLOCK.findall(part)]) for part in parts]


def follow(recipe: Recipe, root: Path, without: str = "") -> None:
    """Make the changes in a copy of the repository, all but those of one file."""
    for block in recipe.changes:
        if block.file == without:
            continue
        path = root / block.file
        if block.language == "diff":
            path.write_text(patched(path.read_text(encoding="utf-8"), block), encoding="utf-8")
        elif block.title.endswith(APPEND):
            path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{block.text}", encoding="utf-8")
        else:
            assert not path.exists(), f"{block.title}: expected a new file, but there is one"
            path.write_text(block.text, encoding="utf-8")


def patched(source: str, block: Block) -> str:
    """The text of a file after a diff. Each place has to be found once."""
    for place in re.split(r"^@@\n", block.text, flags=re.MULTILINE):
        lines = place.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        found = f"\n{source}".count(f"\n{before}")
        assert found == 1, f"{block.title}: expected these lines once, found them {found} times:\n{before}"
        source = f"\n{source}".replace(f"\n{before}", f"\n{after}")[1:]
    return source
