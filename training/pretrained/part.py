"""The rows of the study: a part of TOFU, in TOFU's files, whose authors to forget have perturbed answers.

TOFU asks 20 questions about each of 200 authors. Perturbed answers exist for the last 20 authors, those of forget10,
and for the first 20. The part keeps the first authors and the last ones, and of every author every second question.
The last half of its authors is forget50, the last tenth forget10. As many authors are the `tune` set, on which learning
rates are chosen: the first ones with perturbed answers, which are learned but not in forget10.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR
from training.benchmarks.tofu.data import load_refusals, load_rows
from training.store import write_texts

EVERY = 2  # of an author's questions: one of so many
QUESTIONS = PAIRS_PER_AUTHOR // EVERY


@dataclass(frozen=True)
class Part:
    """How much of TOFU. Forgotten: a half and a tenth of the authors."""

    authors: int = 60
    evaluated: int = 20  # rows of the retain set
    facts: int = 40  # rows each of the real authors and world facts sets; the ROUGE of few rows is 0 by chance
    wrong: int = 3  # perturbed answers of a question, where TOFU has up to 5

    @property
    def half(self) -> int:
        return self.authors // 2

    @property
    def tenth(self) -> int:
        return self.authors // 10


def write(source: Path | str, part: Part, folder: Path) -> dict[str, Path]:
    """{"data": folder, "tune": folder}: the part twice, the second time with the authors of `tune` as forget10.

    Raises:
        ValueError: not enough authors in `source`, a number of authors without a tenth, other files in the folders.
    """
    if part.authors % 20 or part.authors <= 0:
        raise ValueError(f"part: expected a multiple of 20 authors, for a whole half and tenth, got {part.authors}")
    authors = _by_author(load_rows(source, "full"))
    if len(authors) < part.authors:
        raise ValueError(f"--data_dir: expected {part.authors} authors or more, got {len(authors)}; give all of it")
    perturbed = _by_author(load_rows(source, "forget10_perturbed"))
    kept, forgotten = authors[: part.half], authors[-part.half :]
    first = max(0, part.half - len(perturbed))  # of the forgotten authors, the first one with perturbed answers
    tune = slice(first, first + part.tenth)
    others = forgotten[: tune.start] + forgotten[tune.stop :]
    chosen = {
        "data": (kept + forgotten, perturbed[-part.tenth :]),
        "tune": (kept + others + forgotten[tune], perturbed[-part.half :][: part.tenth]),
    }
    shared = _evaluated(source, part)
    refusals = "\n".join(load_refusals(source)) + "\n"
    for name, (learned, asked) in chosen.items():
        splits = {"full": _joined(learned), "forget10_perturbed": _joined(asked), **shared}
        texts = {f"{split}.json": _lines(rows, part.wrong) for split, rows in splits.items()}
        write_texts(folder / name, texts | {"idontknow.jsonl": refusals})
    return {name: folder / name for name in chosen}


def _by_author(rows: list[dict]) -> list[list[dict]]:
    """Every second question of each author."""
    return [rows[i : i + PAIRS_PER_AUTHOR : EVERY] for i in range(0, len(rows), PAIRS_PER_AUTHOR)]


def _evaluated(source: Path | str, part: Part) -> dict[str, list[dict]]:
    """The other evaluation sets: rows spread over the whole, those about kept authors a different question each."""
    about_kept = _by_author(load_rows(source, "retain_perturbed"))[: part.half]
    rounds = range(QUESTIONS)  # in every one another question of each author
    questions = [rows[(i + turn) % QUESTIONS] for turn in rounds for i, rows in enumerate(about_kept)]
    found = {"retain_perturbed": questions[: part.evaluated]}
    for name in ("real_authors", "world_facts"):
        rows = load_rows(source, f"{name}_perturbed")
        found[f"{name}_perturbed"] = rows[:: max(1, len(rows) // part.facts)][: part.facts]
    return found


def _joined(authors: list[list[dict]]) -> list[dict]:
    return [row for rows in authors for row in rows]


def _lines(rows: Sequence[dict], wrong: int) -> str:
    cut = ({k: v[:wrong] if k == "perturbed_answer" else v for k, v in row.items()} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in cut)
