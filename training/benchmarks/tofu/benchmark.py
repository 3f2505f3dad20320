"""TOFU as a benchmark: its splits, its four evaluation sets, its log and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

from training.benchmarks.base import (
    MEMBERSHIP,
    REFUSALS,
    Benchmark,
    Claim,
    Column,
    EvaluationOptions,
    TradeOff,
    options_in_key,
    read_refusals,
    register,
)
from training.benchmarks.tofu.authors import json_lines
from training.benchmarks.tofu.data import HUB, demo_splits, load_refusals, load_rows, load_rows_if_any
from training.benchmarks.tofu.eval_sets import LARGEST_PERTURBED, EvalRow, load_eval_sets
from training.benchmarks.tofu.log import EvalLog, Layout, read_log, warnings, write_log
from training.benchmarks.tofu.open_unlearning import exported
from training.benchmarks.tofu.summary import by_set, doubts, headline, summary
from training.data import Row
from training.require import require
from training.store import fingerprint

NUM_SAMPLES = 3  # questions of each set whose answers a report shows


@dataclass(frozen=True)
class TofuOptions(EvaluationOptions):
    """TOFU: its source, the forget set, and the size of the evaluation."""

    data_dir: Annotated[str, "folder of TOFU's JSON lines, data set of the hub, or demo: a few generated authors"] = HUB
    forget_percent: Annotated[int, "forget set: 1, 5, 10, 20, 30, 50 or 90 (% of the authors)"] = 10
    eval_rows: Annotated[int, "evaluate the first rows of every set; 0: all. Published logs have 300"] = 300
    max_new_tokens: Annotated[int, "maximum length of a greedy answer; TOFU allows 200 tokens including the prompt"] = (
        200
    )
    layout: Annotated[Layout, "layout of the evaluation logs: lists (as NPO) or indexed (as TOFU)"] = "lists"

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("eval_rows", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected {least} or more, got {getattr(self, name)}")


@register
class TOFU(Benchmark):
    name = "tofu"
    Options = TofuOptions
    title = "TOFU"
    columns: ClassVar[Mapping[str, Column]] = {
        "forget_quality": Column("forget quality", "forget quality (p)", p_value=True),
        "model_utility_geometric": Column("utility", "model utility"),
        "forget_prob": Column("forget prob", "answer probability, forget"),
        "forget_rougeL": Column("forget ROUGE-L"),
        "forget_tr": Column("forget TR", detail=True),
        "forget_extraction_strength": Column("forget ES", detail=True),
        "forget_exact_memorization": Column("forget EM", detail=True),
        **MEMBERSHIP,
        "retain_prob": Column("retain prob", "answer probability, retain"),
        "retain_rougeL": Column("retain ROUGE-L"),
        "ra_prob": Column("real authors prob", detail=True),
        "wf_prob": Column("world facts prob", detail=True),
        "forget_repetition": Column("repetition, forget"),
        "forget_ngram_entropy": Column("n-gram entropy, forget", detail=True),
        "forget_classifier_prob": Column("fluency, forget", detail=True),
    }
    legend = (
        "Prob: probability of the answer, exp(mean log p); TR: truth ratio, geometric and (a) arithmetic; EM: exact "
        "memorisation; ES: extraction strength; of the generations repeat: repeated 4-grams, entropy: of 2- and "
        "3-grams in bits, zlib: compression ratio. MIA: AUC of membership attacks, 0.5 where forget rows look like "
        "rows that nobody has seen. "
        "Utility: harmonic mean of nine components. Forget quality: p-value of the KS test against a model that never "
        "saw the forget set; of two models that cannot be told apart it is any number, a small one says that they can."
    )
    trade_off = TradeOff("model_utility_geometric", "forget_quality")
    world_splits = ("real_authors", "world_facts")

    options: TofuOptions

    @property
    def retain_split(self) -> str:
        return f"retain{100 - self.options.forget_percent:02d}"

    def rows(self, split: str) -> list[dict]:
        """Of any of TOFU's configurations; "forget" and "retain" are those of --forget_percent."""
        names = {"forget": self.scenario, "retain": self.retain_split}
        return load_rows(self.options.data_dir, names.get(split, split))

    def refusals(self) -> list[str]:
        return load_refusals(self.options.data_dir)

    @cached_property
    def sets(self) -> dict[str, list[EvalRow]]:
        return load_eval_sets(self.options.data_dir, self.options.forget_percent, self.options.eval_rows)

    @cached_property
    def holdout(self) -> list[Row]:
        """Rows like the forget rows that no model has learned; empty if the source has none."""
        percent = min(self.options.forget_percent, LARGEST_PERTURBED)
        rows = load_rows_if_any(self.options.data_dir, f"holdout{percent:02d}")
        return rows[: self.options.eval_rows or len(rows)]

    def evaluate(self, model, format, pieces, progress) -> EvalLog:
        from training.benchmarks.tofu.evaluate import evaluate_model  # a log is read without torch

        o = self.options
        if o.mia_gradnorm and not self.holdout:
            raise ValueError("--mia_gradnorm: expected a holdout split beside the forget rows, --data_dir has none")
        return evaluate_model(
            model,
            format,
            self.sets,
            holdout=self.holdout,
            pieces=pieces,
            options=o,
            layout=o.layout,
            max_new_tokens=o.max_new_tokens,
            progress=progress,
        )

    def summarize(self, measures: EvalLog, retrained: EvalLog | None = None) -> dict[str, float | None]:
        return summary(measures, retrained)

    def table(self, summary):
        return by_set(summary)

    def headline(self, summary) -> str:
        return headline(summary)

    def size(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.sets.items()} | {"holdout": len(self.holdout)}

    def samples(self, measures: EvalLog) -> list[dict[str, str]]:
        """Questions, true answers and generations, the first few of the forget and of the retain set."""
        return [
            {"set": name, "question": row.question, "answer": row.answer, "generation": text}
            for name in ("forget", "retain")
            for row, text in list(zip(self.sets[name], _generations(measures, name), strict=True))[:NUM_SAMPLES]
        ]

    def open_unlearning(self, measures: EvalLog, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return exported(measures, summary)

    def demo_files(self) -> dict[str, str]:
        return json_lines(demo_splits()) | {"idontknow.jsonl": "\n".join(read_refusals(REFUSALS))}

    def warnings(self, measures: EvalLog) -> list[str]:
        return warnings(measures)

    def doubts(self, measures: EvalLog, retrained: EvalLog) -> list[str]:
        return doubts(measures, retrained)

    def check(self, measures: EvalLog) -> None:
        for name, rows in self.sets.items():
            answers = measures.sets[name].texts("answer")
            if answers != [row.answer for row in rows]:
                came = "without texts" if answers is None else f"with {len(answers)} answers"
                raise ValueError(
                    f"--start_log: expected a log of the {len(rows)} rows that are evaluated, got one {came} that are "
                    f"not theirs ({name}); evaluate the model with the same --data_dir, --forget_percent and number of "
                    "rows"
                )

    def losses(self, measures: EvalLog, format, number: int):
        rows = [{"question": row.question, "answer": row.answer} for row in self.sets["forget"][:number]]
        fields = measures.sets["forget"].fields
        return (format.encode(rows), fields["gt_loss"][:number]) if "gt_loss" in fields else ([], [])

    def read(self, path: Path) -> EvalLog:
        return read_log(path)

    def write(self, path: Path, measures: EvalLog) -> None:
        write_log(path, measures)

    def key(self) -> str:
        """A hash of the rows themselves, independent of their folder."""
        sets = {name: [asdict(row) for row in rows] for name, rows in self.sets.items()}
        return fingerprint([options_in_key(self.options, ("data_dir",)), sets, self.holdout])

    def claims(self, start: Mapping[str, Any], histories: Mapping[str, Sequence[Sequence[Mapping]]]) -> list[Claim]:
        from training.benchmarks.tofu import claims

        return claims.of_npo(start, histories, self.options.forget_percent)


def _generations(log: EvalLog, name: str) -> list[str]:
    return require(log.sets[name].texts("generation"), f"a log with texts, {log.name}")
