"""Write a part of TOFU for small machines: fewer retain authors, all files in TOFU's layout.

    python -m training.subset --data_dir path/to/tofu --forget_percent 5 --retain_authors 30 --out runs/tofu_small

All authors to forget are included, and the first ones of the others, which retain_perturbed asks about. Files:
full, forgetXX, retainYY, forgetXX_perturbed, retain_perturbed (rows of kept authors), real_authors, world_facts, both
with their perturbed answers, and idontknow. The percentages in the names are those of the full TOFU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR
from training.benchmarks.tofu.data import HUB, load_refusals, load_rows
from training.benchmarks.tofu.eval_sets import eval_splits
from training.commands.options import command_line
from training.store import write_texts

PROG = "training.subset"
UNCHANGED = ("real_authors", "world_facts")


@dataclass(frozen=True)
class SubsetOptions:
    """Which part."""

    data_dir: Annotated[str, "folder with TOFU's JSON lines, or a data set of the hub"] = HUB
    forget_percent: Annotated[int, "forget set"] = 5
    retain_authors: Annotated[int, "authors to keep, 20 rows each"] = 30
    out: Annotated[Path, "folder to write"] = Path("runs/tofu_small")
    fresh: Annotated[bool, "overwrite existing files whose content differs"] = False


def main(options: SubsetOptions) -> dict[str, list[dict]]:
    """{file: rows} that was written."""
    percent, count = options.forget_percent, options.retain_authors * PAIRS_PER_AUTHOR
    forget, retain = f"forget{percent:02d}", f"retain{100 - percent:02d}"
    rows = {name: load_rows(options.data_dir, name) for name in (forget, retain, *UNCHANGED)}
    if not 0 < count <= len(rows[retain]):
        available = len(rows[retain]) // PAIRS_PER_AUTHOR
        raise ValueError(f"--retain_authors: expected 1 to {available}, got {options.retain_authors}")
    rows[retain] = rows[retain][:count]
    rows["full"] = rows[retain] + rows[forget]
    rows |= {split: load_rows(options.data_dir, split) for split in eval_splits(percent).values()}
    rows["retain_perturbed"] = rows["retain_perturbed"][:count]
    others = sorted(path.name for path in options.out.glob("*.json") if path.stem not in rows)
    if others:
        raise ValueError(f"--out {options.out}: expected a folder without other splits, got {', '.join(others)}")
    texts = {
        f"{name}.json": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        for name, some in rows.items()
    }
    texts["idontknow.jsonl"] = "\n".join(load_refusals(options.data_dir)) + "\n"
    write_texts(options.out, texts, options.fresh)
    return rows


if __name__ == "__main__":
    command_line(PROG, SubsetOptions, __doc__, main)
