"""Evaluate block by block. Finished blocks are saved, so an interrupted evaluation can resume."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from training import distributed
from training.store import finished, remove, write_record

BLOCK = 256  # items
Item = TypeVar("Item")


class Pieces:
    """Finished blocks of one evaluation.

    Args:
        name: of the evaluation, for messages and logs.
        folder: holds the blocks until `clear`. None: blocks are not saved.
        key: hash of everything that the values depend on, including the weights. Blocks of another key are ignored.
    """

    def __init__(self, name: str, folder: Path | None = None, key: str = ""):
        self.name, self.folder, self.key = name, folder, key

    def rows(
        self, part: str, items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Any]], size: int = BLOCK
    ) -> list[Any]:
        """Apply `compute` to all items in blocks of `size`. Each value must be JSON-serialisable.

        The blocks are the same whether or not some were found, so a resumed evaluation has the values of one that was
        not interrupted. `part` tells the calls of an evaluation apart.
        """
        values: list[Any] = []
        for start in range(0, len(items), size):
            block = items[start : start + size]
            path = self.folder and self.folder / f"{part}-{start:06d}.json"
            record = finished(path, self.key) if path else None
            if distributed.any_of(record is None):  # all processes work on a block, or none
                record = self._made(part, block, compute)
                if path:
                    self._write(path, record)
            values += record["values"] if record else []
        return values

    def _made(self, part: str, block: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Any]]) -> dict:
        values = list(compute(block))
        if len(values) != len(block):
            raise ValueError(f"{part}: expected a value for each of {len(block)} items, got {len(values)}")
        return {"key": self.key, "values": json.loads(json.dumps(values))}  # as they would be read

    def _write(self, path: Path, record: dict) -> None:
        distributed.on_main(lambda: write_record(path, record))

    def clear(self) -> None:
        """Remove the blocks, after the whole evaluation was written."""
        folder = self.folder
        if folder:
            distributed.on_main(lambda: remove(folder))
