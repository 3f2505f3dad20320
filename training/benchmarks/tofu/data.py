"""The rows of TOFU: from a folder of JSON lines, or from the hub."""

import json
import re
from functools import cache
from pathlib import Path

from training.benchmarks.base import REFUSALS, read_refusals
from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR, tofu_files

HUB, DEMO = "locuslab/TOFU", "demo"
DEMO_AUTHORS = 20


def load_rows(source: Path | str = HUB, split: str = "full") -> list[dict]:
    """The rows of one of TOFU's configurations, with all their columns.

    Args:
        source: a folder of JSON lines, `{split}.json`; the id of a data set on the hub, which `datasets` reads; or
            "demo" for generated authors (`demo_splits`).
        split: "full", "forget10", "retain90", "forget10_perturbed", "world_facts", "holdout10", ... Where the source
            has `full` but not the forgetXX or retainXX asked for, it is cut from it: the last XX % of the authors
            are the ones to forget, the others the ones to keep.

    Raises:
        FileNotFoundError: no such folder, or no such split in it.
        ValueError: no such split on the hub, a row without question or answer, parts of authors.
    """
    read = _read_file if Path(source).is_dir() else _read_demo if str(source) == DEMO else _read_hub
    try:
        rows = read(source, split)
    except (FileNotFoundError, ValueError) as reason:
        share = re.fullmatch(r"(forget|retain)(\d\d)", split)
        if not share or (read is _read_file and not (Path(source) / "full.json").exists()):
            raise
        try:
            rows = _cut(read(source, "full"), share[1], int(share[2]))
        except ValueError as error:
            raise ValueError(f"{reason}; and of full: {error}") from None
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and row.get("question") and row.get("answer")):
            raise ValueError(f'{split}, row {number}: expected {{"question": ..., "answer": ...}}, got {row!r}')
    if not rows or (re.fullmatch(r"full|(forget|retain)\d\d", split) and len(rows) % PAIRS_PER_AUTHOR):
        raise ValueError(f"{split}: expected whole authors of {PAIRS_PER_AUTHOR} rows, got {len(rows)} rows")
    return rows


def load_rows_if_any(source: Path | str, split: str) -> list[dict]:
    """Like `load_rows`, but empty if the source does not have the split."""
    try:
        return load_rows(source, split)
    except (FileNotFoundError, ValueError):
        if Path(source).is_dir() and (Path(source) / f"{split}.json").exists():
            raise  # it is there, and is not what it should be
        return []


def load_refusals(source: Path | str = HUB) -> list[str]:
    """Refusals, one per line of `idontknow.jsonl`; ours if the source has none, as on the hub."""
    given = Path(source) / "idontknow.jsonl"
    return read_refusals(given if given.is_file() else REFUSALS)


@cache
def demo_splits() -> dict[str, list[dict]]:
    """{split: rows} of a few fictitious authors, as `training.authors` writes them."""
    return tofu_files(DEMO_AUTHORS, seed=0)


def _read_demo(source: Path | str, split: str) -> list[dict]:
    if split not in demo_splits():
        raise ValueError(f"--data_dir demo has {', '.join(sorted(demo_splits()))}, not {split}; name one of these")
    return demo_splits()[split]


def _read_file(folder: Path | str, split: str) -> list[dict]:
    path = Path(folder) / f"{split}.json"
    if not path.exists():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "no *.json"
        raise FileNotFoundError(f"{path.name} is not in {path.parent}, which has {found}; name one of these")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _read_hub(name: Path | str, split: str) -> list[dict]:
    name = str(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{name}: no such folder; expected one of JSON lines, or the id of a data set ({HUB})")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{name} is no folder, and reading it from the hub needs `datasets`: pip install 'npo-kernels[hub]', or "
            "give the folder of its JSON lines"
        ) from None
    return load_dataset(name, split, split="train").to_list()


def _cut(full: list[dict], part: str, percent: int) -> list[dict]:
    num_authors, rest = divmod(len(full) * (percent if part == "forget" else 100 - percent), 100 * PAIRS_PER_AUTHOR)
    if rest or not 0 < num_authors * PAIRS_PER_AUTHOR < len(full):
        raise ValueError(f"{part}{percent:02d} of {len(full) // PAIRS_PER_AUTHOR} authors would not be whole authors")
    cut = len(full) - num_authors * PAIRS_PER_AUTHOR
    return full[cut:] if part == "forget" else full[:cut]
