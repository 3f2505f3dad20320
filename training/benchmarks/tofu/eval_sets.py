"""TOFU's four evaluation sets: questions with a true answer, a paraphrase of it, and wrong ones to compare with."""

from dataclasses import dataclass
from pathlib import Path

from training.benchmarks.tofu.data import HUB, load_rows
from training.benchmarks.tofu.log import OPTION_SETS

# The larger forget sets have no perturbed answers; the NPO paper scores them on the last tenth, which they contain.
LARGEST_PERTURBED = 10


@dataclass(frozen=True)
class EvalRow:
    question: str
    answer: str
    paraphrased: str | None  # None: the answer itself takes its place, as for real authors and world facts
    perturbed: list[str]


def eval_splits(forget_percent: int) -> dict[str, str]:
    """{set: split} of the evaluation sets when `forget_percent` % of the authors are forgotten."""
    return {
        "retain": "retain_perturbed",
        "ra": "real_authors_perturbed",
        "wf": "world_facts_perturbed",
        "forget": f"forget{min(forget_percent, LARGEST_PERTURBED):02d}_perturbed",
    }


def load_eval_sets(source: Path | str = HUB, forget_percent: int = 10, rows: int = 300) -> dict[str, list[EvalRow]]:
    """The first `rows` rows of each set (the published logs have 300; 0: all), from where `load_rows` finds them."""
    sets = {}
    for name, split in eval_splits(forget_percent).items():
        found = _checked(split, load_rows(source, split), needs_paraphrase=name not in OPTION_SETS)
        sets[name] = found[: rows or len(found)]
    return sets


def _checked(split: str, found: list[dict], needs_paraphrase: bool) -> list[EvalRow]:
    rows = []
    for number, row in enumerate(found, 1):
        needed = ["question", "answer", "perturbed_answer"] + ["paraphrased_answer"] * needs_paraphrase
        absent = [key for key in needed if not row.get(key)]
        if absent or not isinstance(row["perturbed_answer"], list):
            raise ValueError(
                f"{split}, row {number}: expected {', '.join(needed)}, the third a list; "
                f"{', '.join(absent) or 'it'} is not there"
            )
        paraphrased = row["paraphrased_answer"] if needs_paraphrase else None
        rows.append(EvalRow(row["question"], row["answer"], paraphrased, row["perturbed_answer"]))
    if len({len(row.perturbed) for row in rows}) != 1:
        raise ValueError(f"{split}: expected rows with the same number of perturbed answers, got {len(rows)} rows")
    return rows
