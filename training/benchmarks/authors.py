"""Fictitious authors, evaluated by answer probability only: the benchmark of `training.demo`, minutes on a CPU.

The authors are generated, or the last ones of a folder in TOFU's form. Measured is the probability of the true answers,
on all rows of the authors to forget, and on those of a seeded sample of the authors to keep.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch

from training import membership, metrics
from training.benchmarks.base import ITSELF, MEMBERSHIP, Benchmark, Column, EvaluationOptions, options_in_key, register
from training.benchmarks.tofu.authors import PAIRS_PER_AUTHOR, generate_authors, generate_holdout
from training.benchmarks.tofu.data import load_rows
from training.data import Row
from training.store import fingerprint


class Split(NamedTuple):
    """The authors to forget and the ones to keep; 20 consecutive rows are one author."""

    forget: list[Row]
    retain: list[Row]


@dataclass(frozen=True)
class AuthorsOptions(EvaluationOptions):
    """The authors: how many, their source, and which to forget."""

    data_dir: Annotated[Path | None, "folder with TOFU's JSON lines; without it, fictitious authors are generated"] = (
        None
    )
    authors: Annotated[int, "number of authors, 20 pairs each; 0: all of --data_dir (TOFU has 200)"] = 60
    forget_percent: Annotated[
        int, "share of the authors to forget, to whole authors; selects forgetXX.json and retainYY.json"
    ] = 10
    retain_eval_authors: Annotated[int, "number of retain authors in the evaluation, a seeded sample"] = 8
    data_seed: Annotated[int, "seed of the generated authors and of the sample"] = 0
    eval_batch_size: Annotated[int, "sequences per forward in evaluation"] = 64


@register
class Authors(Benchmark):
    name = "authors"
    Options = AuthorsOptions
    title = "Fictitious authors"
    columns: ClassVar[Mapping[str, Column]] = {
        "forget_prob": Column("forget prob", "answer probability, authors to forget"),
        "retain_prob": Column("keep prob", "answer probability, authors to keep"),
        "forget_exact_memorization": Column("forget EM", detail=True),
        "forget_extraction_strength": Column("forget ES", detail=True),
        **MEMBERSHIP,
    }
    legend = (
        "Prob: exp(mean log-probability of the tokens of the true answer and its end), averaged over the pairs. The "
        "authors to keep are those whose rows a method with a retain term rehearses, so this is retention, not "
        "generalisation. EM, ES: exact memorisation, extraction strength; MIA: AUC of membership attacks, with "
        "authors whom no model has learned."
    )

    options: AuthorsOptions

    def __init__(self, options: AuthorsOptions):
        super().__init__(options)
        if options.fluency_classifier:
            raise ValueError(
                "--fluency_classifier: authors are measured by probabilities alone, so there is nothing to classify; "
                "take --benchmark tofu"
            )

    @cached_property
    def split(self) -> Split:
        o = self.options
        return load_split(o.data_dir, o.authors, o.forget_percent, o.data_seed)

    def rows(self, split: str) -> list[Row]:
        parts = {
            "forget": self.split.forget,
            "retain": self.split.retain,
            "full": self.split.retain + self.split.forget,
        }
        if split not in parts:
            raise ValueError(f"--split: authors have {', '.join(parts)}, got {split}")
        return parts[split]

    def alternates(self) -> list[list[str]]:
        """What other authors answer to the same question: the n-th pair of each author asks for the same thing."""
        if self.options.data_dir is not None:
            return []  # TOFU's pairs are in no such order
        retain, forget = self.split.retain, self.split.forget
        authors = range(0, min(len(retain), 5 * PAIRS_PER_AUTHOR), PAIRS_PER_AUTHOR)
        return [[retain[first + i % PAIRS_PER_AUTHOR]["answer"] for first in authors] for i in range(len(forget))]

    @cached_property
    def evaluated(self) -> dict[str, list[Row]]:
        o = self.options
        kept = sample_authors(self.split.retain, o.retain_eval_authors, o.data_seed)
        return {"forget": self.split.forget, "retain": kept}

    @cached_property
    def holdout(self) -> list[Row]:
        """As many rows as in the forget set, of authors that no model learns; none if the rows come from a folder."""
        o = self.options
        count = len(self.split.forget) // PAIRS_PER_AUTHOR
        return generate_holdout(o.authors, count, o.data_seed) if o.data_dir is None else []

    def evaluate(self, model, format, pieces, progress) -> dict[str, dict[str, Any]]:
        """{set: {"rows": `Answers.measures`, "question", "answer", "generation": of the first row}}"""
        from training.benchmarks.answers import Answers
        from training.generation import complete_all
        from training.progress import counted

        sets = self.evaluated | ({"holdout": self.holdout} if self.holdout else {})
        firsts = [rows[0] for rows in sets.values()]
        texts = complete_all(model, format, [row["question"] for row in firsts], max_new_tokens=48)
        counts = counted(progress, "Evaluation", sum(map(len, sets.values())))
        answers = Answers(model, format, self.options, pieces, counts)
        measures = {}
        for (which, rows), first, text in zip(sets.items(), firsts, texts, strict=True):
            found = answers.measures(which, rows, attacked=which != "retain")
            counts(len(rows))
            measures[which] = {"rows": found, **first, "generation": text}
        counts.done()
        return measures

    def summarize(self, measures, retrained=None) -> dict[str, float | None]:
        summary: dict[str, float | None] = {}
        for which in ("forget", "retain"):
            rows = measures[which]["rows"]
            summary[f"{which}_prob"] = metrics.mean(math.exp(-row["nll"] / row["num_tokens"]) for row in rows)
            for name in ("exact_memorization", "extraction_strength"):
                summary[f"{which}_{name}"] = metrics.mean(row[name] for row in rows)
        if "holdout" in measures:
            before = _attacked(retrained) if retrained and "holdout" in retrained else None
            summary |= membership.summary(*_attacked(measures), retrained=before)
        return summary

    def read(self, path: Path) -> dict[str, dict[str, Any]]:
        measures = super().read(path)
        if not (isinstance(measures, dict) and all("rows" in found for found in measures.values())):
            raise ValueError(f"{path}: expected an evaluation of --benchmark authors, got {', '.join(measures)}")
        return measures

    def check(self, measures) -> None:
        for which, rows in self.evaluated.items():
            found = measures.get(which, {"rows": []})
            if len(found["rows"]) != len(rows) or any(found[key] != rows[0][key] for key in ("question", "answer")):
                raise ValueError(
                    f"--start_log: expected measures of the {len(rows)} {which} rows that are evaluated, got "
                    f"{len(found['rows'])} that are not theirs; evaluate the model with the same options"
                )

    def doubts(self, measures, retrained) -> list[str]:
        attacked = _attacked(retrained) if "holdout" in retrained else None
        return [ITSELF] * (measures["forget"] == retrained["forget"]) + membership.doubts(attacked)

    def losses(self, measures, format, number: int):
        rows = self.split.forget[:number]
        return format.encode(rows), [row["nll"] for row in measures["forget"]["rows"][:number]]

    def samples(self, measures) -> list[dict[str, str]]:
        texts = ("question", "answer", "generation")
        return [{"set": which, **{key: measures[which][key] for key in texts}} for which in ("forget", "retain")]

    def key(self) -> str:
        return fingerprint([options_in_key(self.options, ("data_dir",)), self.evaluated, self.holdout])


def _attacked(measures: dict[str, Any]) -> tuple[membership.Attacks, membership.Attacks]:
    forget, holdout = (membership.attacks_of(measures[which]["rows"]) for which in ("forget", "holdout"))
    return forget, holdout


def load_split(data_dir: Path | None, num_authors: int, forget_percent: int, seed: int) -> Split:
    """The last `forget_percent` % of the authors are to be forgotten, as in TOFU.

    Without a `data_dir` the authors are generated. With one, TOFU's forgetXX and retainYY are read (`load_rows`), and
    `num_authors` (0: all) keeps the last authors of both, in the same proportion.
    """
    if not 0 < forget_percent < 100:
        raise ValueError(f"forget_percent: expected 1 to 99, got {forget_percent}")
    if data_dir is None:
        rows = generate_authors(num_authors, seed) if num_authors > 1 else []
        cut = len(rows) - _num_forget(num_authors, forget_percent) * PAIRS_PER_AUTHOR
        return Split(rows[cut:], rows[:cut])
    forget = load_rows(data_dir, f"forget{forget_percent:02d}")
    retain = load_rows(data_dir, f"retain{100 - forget_percent:02d}")
    available = (len(forget) + len(retain)) // PAIRS_PER_AUTHOR
    num_authors = num_authors or available
    if num_authors > available:
        raise ValueError(f"authors: {num_authors} asked for, but {data_dir.name} has {available}; ask for fewer")
    num_forget = _num_forget(num_authors, forget_percent)
    kept = {"forget": num_forget * PAIRS_PER_AUTHOR, "retain": (num_authors - num_forget) * PAIRS_PER_AUTHOR}
    return Split(forget[-kept["forget"] :], retain[-kept["retain"] :])


def _num_forget(num_authors: int, forget_percent: int) -> int:
    if num_authors < 2:
        raise ValueError(f"authors: expected at least 2, one to forget and one to keep, got {num_authors}")
    return min(num_authors - 1, max(1, round(num_authors * forget_percent / 100)))


def sample_authors(rows: list[Row], num_authors: int, seed: int) -> list[Row]:
    """All rows of `num_authors` seeded authors, in the order of `rows`."""
    total = len(rows) // PAIRS_PER_AUTHOR
    picked = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num_authors].sort().values
    return [row for a in picked.tolist() for row in rows[a * PAIRS_PER_AUTHOR : (a + 1) * PAIRS_PER_AUTHOR]]
