"""TOFU's four evaluation sets: questions with a true answer, a paraphrase of it, and wrong ones to compare with."""

import json
from dataclasses import dataclass
from pathlib import Path

from training.eval_log import OPTION_SETS

# The larger forget sets have no perturbed answers; the NPO paper scores them on the last tenth, which they contain.
LARGEST_PERTURBED = 10


@dataclass(frozen=True)
class EvalRow:
    question: str
    answer: str
    paraphrased: str | None  # None: the answer itself takes its place, as for real authors and world facts
    perturbed: list[str]


def eval_files(forget_percent: int) -> dict[str, str]:
    """{set: file} of the evaluation sets when `forget_percent` % of the authors are forgotten."""
    return {
        "retain": "retain_perturbed.json",
        "ra": "real_authors_perturbed.json",
        "wf": "world_facts_perturbed.json",
        "forget": f"forget{min(forget_percent, LARGEST_PERTURBED):02d}_perturbed.json",
    }


def load_eval_sets(data_dir: Path, forget_percent: int, rows: int) -> dict[str, list[EvalRow]]:
    """The first `rows` rows of each set (the published logs have 300; 0: all)."""
    sets = {}
    for name, file in eval_files(forget_percent).items():
        found = _read(data_dir / file, needs_paraphrase=name not in OPTION_SETS)
        sets[name] = found[: rows or len(found)]
    return sets


def _read(path: Path, needs_paraphrase: bool) -> list[EvalRow]:
    if not path.is_file():
        present = ", ".join(sorted(p.name for p in path.parent.glob("*_perturbed.json"))) or "no *_perturbed.json"
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}, which has {present}; give TOFU's folder (--data_dir), and a "
            "--forget_percent of 1, 5, 10 or more"
        )
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        row = json.loads(line)
        needed = ["question", "answer", "perturbed_answer"] + ["paraphrased_answer"] * needs_paraphrase
        absent = [key for key in needed if not row.get(key)]
        if absent or not isinstance(row["perturbed_answer"], list):
            raise ValueError(
                f"{path.name}, row {number}: expected {', '.join(needed)}, the third a list; "
                f"{', '.join(absent) or 'it'} is not there"
            )
        paraphrased = row["paraphrased_answer"] if needs_paraphrase else None
        rows.append(EvalRow(row["question"], row["answer"], paraphrased, row["perturbed_answer"]))
    if len({len(row.perturbed) for row in rows}) != 1:
        raise ValueError(f"{path.name}: expected rows with the same number of perturbed answers, got {len(rows)} rows")
    return rows
