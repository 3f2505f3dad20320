"""WMDP as a benchmark: forget and retain corpora, questions about the forgotten topics, MMLU for the rest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from training.benchmarks.base import MEMBERSHIP, Benchmark, Column, EvaluationOptions, TradeOff, register
from training.benchmarks.wmdp.data import FORGOTTEN, HUB, SPLITS, Kept, Source, corpora, interleaved, source_named
from training.benchmarks.wmdp.generate import generate_files
from training.benchmarks.wmdp.questions import LETTERS, SUBJECTS, Question
from training.benchmarks.wmdp.summary import MMLU, by_task, doubts, lm_eval_summary, summary
from training.config import Switch
from training.data import Example, Row
from training.store import fingerprint

NUM_SAMPLES = 2  # questions of each task that a report shows
SAMPLED_SUBJECTS = 3  # of MMLU


@dataclass(frozen=True)
class WmdpOptions(EvaluationOptions):
    """WMDP: its source, forget and retain corpora, and the size of the evaluation."""

    data_dir: Annotated[
        str, "folder with the published files (training/benchmarks/wmdp/data.py), a data set of the hub, or demo: made "
        "up for a small model"
    ] = HUB  # fmt: skip
    topics: Annotated[str, f"topics to forget, from {', '.join(FORGOTTEN)}, separated by commas"] = "bio,cyber"
    retain_corpus: Annotated[Kept, "retain corpus: the topics' own corpora, wikitext, or both"] = "own"
    forget_documents: Annotated[int, "forget the first documents of each corpus; 0: all"] = 0
    min_chars: Annotated[int, "documents with at most this many characters are left out"] = 50
    max_tokens: Annotated[int, "documents are cut to this length"] = 512
    joined: Annotated[bool, "join documents and cut them into pieces of --max_tokens, so that no text is dropped"] = (
        False
    )
    mmlu: Annotated[bool, "evaluate MMLU, for what is kept"] = True
    questions: Annotated[int, "evaluate the first questions of each topic and MMLU subject; 0: all"] = 0
    eval_documents: Annotated[int, "measure the perplexity of the first documents of each corpus; 0: none"] = 50
    bos: Annotated[Switch, "begin questions with <bos>. auto: only for Gemma, as lm-evaluation-harness"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        if not self.topic_names or set(self.topic_names) - set(FORGOTTEN):
            raise ValueError(f"--topics: expected some of {', '.join(FORGOTTEN)}, got {self.topics!r}")
        if self.retain_corpus not in get_args(Kept):
            raise ValueError(f"--retain_corpus: expected {', '.join(get_args(Kept))}, got {self.retain_corpus!r}")
        for name, least in {
            "forget_documents": 0, "min_chars": 0, "max_tokens": 2, "questions": 0, "eval_documents": 0,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"--{name}: expected at least {least}, got {getattr(self, name)}")
        if self.fluency_classifier is not None:
            raise ValueError("--fluency_classifier reads generations, and WMDP has none: leave the option out")

    @property
    def topic_names(self) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in self.topics.split(",") if name.strip()))


@register
class WMDP(Benchmark):
    name = "wmdp"
    Options = WmdpOptions
    title = "WMDP"
    columns: ClassVar[Mapping[str, Column]] = {
        "wmdp_bio_acc": Column("bio acc", "accuracy, WMDP bio"),
        "wmdp_cyber_acc": Column("cyber acc", "accuracy, WMDP cyber"),
        "wmdp_chem_acc": Column("chem acc", detail=True),
        "mmlu_acc": Column("MMLU acc", "accuracy, MMLU"),
        "wmdp_forgetting": Column("forgetting", "forgetting, 1: chance"),
        "wmdp_bio_prob": Column("bio p(right)", detail=True),
        "wmdp_cyber_prob": Column("cyber p(right)", detail=True),
        "mmlu_prob": Column("MMLU p(right)", detail=True),
        "forget_perplexity": Column("forget ppl"),
        "retain_perplexity": Column("retain ppl"),
        "forget_exact_memorization": Column("forget EM", detail=True),
        "forget_extraction_strength": Column("forget ES", detail=True),
        **MEMBERSHIP,
    }
    legend = (
        "Acc: share of the questions whose right letter is the most likely one, without examples, as "
        "lm-evaluation-harness scores them; 0.25 is chance. p(right): mean probability of the right letter among the "
        "four. Forgetting: (1 - accuracy) / 0.75 on the topics that are forgotten, 1 at chance or below. Ppl: "
        "perplexity a token of the first documents of a corpus; EM: exact memorisation; ES: extraction strength; MIA: "
        "AUC of membership attacks, documents to forget against held-out ones."
    )
    trade_off = TradeOff("mmlu_acc", "wmdp_forgetting")

    options: WmdpOptions

    @property
    def scenario(self) -> str:
        return "-".join(self.options.topic_names)

    @cached_property
    def source(self) -> Source:
        return source_named(self.options.data_dir)

    def rows(self, split: str) -> list[Row]:
        """Documents {"text"}, those of several topics in turn."""
        if split == "full":
            return self.rows("forget") + self.rows("retain")
        return [{"text": text} for text in interleaved(*self._corpora(split))]

    def encode(self, format, rows: Iterable[Row]) -> list[Example]:
        from training.texts import chunks, documents, texts_of

        cut = chunks if self.options.joined else documents
        return cut(format, texts_of(rows), self.options.max_tokens)

    @cached_property
    def tasks(self) -> dict[str, list[Question]]:
        """{task, as lm-evaluation-harness calls it: the questions that are evaluated}"""
        o = self.options
        found = {f"wmdp_{topic}": self.source.wmdp(topic) for topic in SUBJECTS if topic in (*o.topic_names, "chem")}
        if o.mmlu:
            found |= {f"{MMLU}_{subject}": questions for subject, questions in self.source.mmlu().items()}
        return {name: some[: o.questions or len(some)] for name, some in found.items() if some}

    @cached_property
    def documents(self) -> dict[str, list[str]]:
        """{"forget", "retain", "holdout": the documents that are evaluated}"""
        number = self.options.eval_documents
        found = {kind: self._corpora(kind) for kind in SPLITS} if number else {}
        firsts = {kind: [text for corpus in some for text in corpus[:number]] for kind, some in found.items()}
        return {kind: texts for kind, texts in firsts.items() if texts}

    def evaluate(self, model, format, pieces, progress) -> dict[str, Any]:
        from training.benchmarks.wmdp.evaluate import evaluate_model  # a log is read without torch

        o = self.options
        measures = evaluate_model(
            model,
            format,
            self.tasks,
            self.documents,
            pieces=pieces,
            options=o,
            bos=o.bos,
            max_tokens=o.max_tokens,
            progress=progress,
        )
        return {"keys": self._keys, **measures}

    def summarize(self, measures, retrained=None) -> dict[str, float | None]:
        absent = [topic for topic in self.options.topic_names if f"wmdp_{topic}" not in measures["tasks"]]
        if absent:
            raise ValueError(f"--topics: expected an evaluation with questions on {', '.join(absent)}, got one without")
        if retrained and retrained["keys"] != measures["keys"]:
            raise ValueError("--retain_log: expected an evaluation with the same options of WMDP, got one with others")
        return summary(measures, self.options.topic_names, retrained)

    def doubts(self, measures, retrained) -> list[str]:
        return doubts(measures, retrained)

    def table(self, summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
        """Of the accuracies, a line a task; subjects after what they add up to."""
        names = [*(f"wmdp_{topic}" for topic in SUBJECTS), MMLU]
        subjects = sorted(k.removesuffix("_acc") for k in summary if k.startswith(f"{MMLU}_") and k.endswith("_acc"))
        return by_task(summary, {name: name.replace("_", " ") for name in [*names, *subjects]})

    def headline(self, summary: Mapping[str, Any]) -> str:
        shown = {"wmdp_forgetting": "Forgetting", "forget_perplexity": "perplexity of the forget corpus",
                 "retain_perplexity": "of the retain corpus"}  # fmt: skip
        parts = [f"{label} {summary[key]:.3g}" for key, label in shown.items() if summary.get(key) is not None]
        return ", ".join(parts) + "."

    def size(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, some in self.tasks.items():
            name = MMLU if name.startswith(f"{MMLU}_") else name
            counts[name] = counts.get(name, 0) + len(some)
        return counts | {f"{kind} documents": len(texts) for kind, texts in self.documents.items()}

    def samples(self, measures) -> list[dict[str, str]]:
        """Questions, the right choices and the chosen ones: the first of each topic and of some subjects."""
        names = [name for name in self.tasks if not name.startswith(f"{MMLU}_")]
        names += [name for name in self.tasks if name.startswith(f"{MMLU}_")][:SAMPLED_SUBJECTS]
        return [
            {
                "set": name,
                "question": question.question,
                "answer": question.shown(question.answer),
                "generation": question.shown(row["logps"].index(max(row["logps"]))),
            }
            for name in names
            for question, row in islice(zip(self.tasks[name], measures["tasks"][name], strict=True), NUM_SAMPLES)
        ]

    def check(self, measures) -> None:
        theirs = measures["keys"]
        differ = [name for name, key in self._keys.items() if theirs.get(name) != key] + sorted(
            theirs.keys() - self._keys.keys()
        )
        if differ:
            raise ValueError(
                f"--start_log: expected an evaluation of the same questions and documents, got one whose "
                f"{', '.join(differ[:4])} are not these; evaluate the model with the same options of WMDP"
            )

    def losses(self, measures, format, number: int):
        from training.texts import documents

        texts = self.documents.get("forget", [])[:number]
        rows = measures["documents"].get("forget", [])[:number]
        return documents(format, texts, self.options.max_tokens), [row["nll"] * row["tokens"] for row in rows]

    def read(self, path: Path) -> dict[str, Any]:
        measures = super().read(path)
        wanted = {"keys", "tasks", "documents"}
        if not (isinstance(measures, dict) and wanted <= measures.keys() and _has_rows(measures["tasks"])):
            came = ", ".join(measures) if isinstance(measures, dict) else type(measures).__name__
            raise ValueError(f"{path}: expected an evaluation of --benchmark wmdp ({', '.join(wanted)}), got {came}")
        return measures

    def key(self) -> str:
        """A hash of the questions and documents themselves, independent of their folder."""
        o = self.options
        return fingerprint([self.name, self._keys, o.bos, o.max_tokens, o.eval_batch_size, o.mia_gradnorm])

    def open_unlearning(self, measures, summary) -> dict[str, dict]:
        """The file of OpenUnlearning's evaluation by lm-evaluation-harness."""
        return {"LMEval_SUMMARY.json": lm_eval_summary(measures)}

    def demo_files(self) -> dict[str, str]:
        return generate_files()

    @cached_property
    def _keys(self) -> dict[str, str]:
        scoring = {"scoring": [self.options.bos, self.options.max_tokens]}
        evaluated: dict[str, Any] = {**self.tasks, **self.documents, **scoring}
        return {name: fingerprint(some) for name, some in evaluated.items()}

    def _corpora(self, split: str) -> list[list[str]]:
        """The documents of a split, a list for each corpus."""
        if split not in self._read:
            o = self.options
            if split not in SPLITS:
                raise ValueError(f"--split: WMDP has full, {', '.join(SPLITS)}, got {split}")
            found = corpora(self.source, split, o.topic_names, o.retain_corpus, o.min_chars)
            self._read[split] = [some[: o.forget_documents or None] for some in found] if split == "forget" else found
        return self._read[split]

    @cached_property
    def _read(self) -> dict[str, list[list[str]]]:
        return {}


def _has_rows(tasks: Any) -> bool:
    """Whether these are rows of tasks as `evaluate` gives them."""
    rows = [row for some in tasks.values() for row in some] if isinstance(tasks, dict) else []
    return bool(rows) and all(
        isinstance(row, dict) and len(row.get("logps", ())) == len(LETTERS) and "answer" in row for row in rows
    )
