"""MUSE as a benchmark: its splits, its requests one after another, its evaluation sets and metrics."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from training.benchmarks.base import MEMBERSHIP, Benchmark, Column, TradeOff, options_in_key, register
from training.benchmarks.muse.data import DEMO, FORGET_SETS, RAW, Corpus
from training.benchmarks.muse.generate import news_files
from training.benchmarks.muse.options import MuseOptions
from training.benchmarks.muse.sets import Sets, load_sets
from training.benchmarks.muse.summary import check_measures, doubts, exported, headline, read_measures, summary
from training.store import fingerprint

NUM_SAMPLES = 2  # of each set whose generations a report shows
SHOWN = 240  # characters of a text in a report
# Options that say where the rows come from, or what is forgotten: the measures depend on the rows themselves.
NOT_MEASURED = ("data_dir", "forget_set", "data_seed", "demo_items", "eval_batch_size")


@register
class MUSE(Benchmark):
    """Of the raw texts, the target model has learned all that some forget set asks to forget, retain1 and retain2; the
    retrained model, which is the same for every forget set, retain1 and retain2 (these are the splits of the published
    `train` subset, what the target was trained on). Methods rehearse retain1, and utility is measured on retain2.
    """

    name = "muse"
    Options = MuseOptions
    title = "MUSE"
    columns: ClassVar[Mapping[str, Column]] = {
        "forget_verbmem_ROUGE": Column("VerbMem", "VerbMem, forget"),
        "forget_knowmem_ROUGE": Column("KnowMem, forget", "KnowMem, forget"),
        "retain_knowmem_ROUGE": Column("KnowMem, retain", "KnowMem, retain"),
        "forgotten": Column("forgotten"),
        **MEMBERSHIP,
        "privleak": Column("PrivLeak"),
        "mia_min_k": Column("MIA Min-K%", "AUC of Min-K%; 0.5: not told apart"),
        "extraction_strength": Column("ES", detail=True),
        "exact_memorization": Column("EM", detail=True),
        "forget_repetition": Column("repetition"),
        "forget_ngram_entropy": Column("entropy", detail=True),
        "forget_classifier_prob": Column("fluency", detail=True),
    }
    legend = (
        "VerbMem, KnowMem: ROUGE-L F1 of greedy continuations of the forget set, and of answers about the forget and "
        "the retain set; forgotten: 1 - the mean of the first two. Min-K and others: AUC of membership attacks that "
        "tell the forget from the holdout set, 1 where it is plain what was learned. PrivLeak: how far 1 - AUC of "
        "Min-K is from that of the retrained model (without one, as in its own line, from 0.5), in percent: negative "
        "where the forget set still shows, positive where it shows that it was forgotten. ES: extraction strength, EM: "
        "exact memorisation of the texts of VerbMem; repetition: repeated 4-grams of its continuations, entropy: of "
        "their n-grams."
    )
    trade_off = TradeOff("retain_knowmem_ROUGE", "forgotten")

    options: MuseOptions

    @property
    def scenario(self) -> str:
        return self.options.forget_set

    @property
    def retain_split(self) -> str:
        return "retrain"

    @property
    def series(self) -> str:
        return self.options.forget_set.partition("_")[0] if "_" in self.options.forget_set else ""

    @property
    def follows(self) -> str | None:
        """sust_1 starts from the target model, sust_2 from the unlearned model of sust_1, and so on."""
        subset, _, number = self.options.forget_set.partition("_")
        return f"sust_{int(number) - 1}" if subset == "sust" and number != "1" else None

    def scenarios(self, names: str) -> list[Benchmark]:
        chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
        for name in chosen:
            if name not in FORGET_SETS:
                raise ValueError(f"expected some of {', '.join(FORGET_SETS)}, got {name!r}")
        return [type(self)(replace(self.options, forget_set=name)) for name in chosen]

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus(self.options.data_dir, self.demo_files() if self.options.data_dir == DEMO else {})

    def rows(self, split: str) -> list[dict[str, str]]:
        """Of "full", "retrain", "forget" (that of the options), "retain" (retain1), or a split by its name."""
        corpus = self.corpus
        if split in ("full", "retrain"):
            kept = [text for name in ("retain1", "retain2") for text in corpus.texts("raw", name)]
            texts = corpus.forgettable + kept if split == "full" else kept
        elif split == "forget":
            texts = corpus.forget_set(self.options.forget_set)
        elif split in FORGET_SETS:
            texts = corpus.forget_set(split)
        elif split in RAW or split == "retain":
            texts = corpus.texts("raw", "retain1" if split == "retain" else split)
        else:
            there = ", ".join(("full", "retrain", "retain", *RAW, *FORGET_SETS[1:]))
            raise ValueError(f"--split: MUSE has {there}, got {split}")
        return [{"text": text} for text in texts]

    def encode(self, format, rows):
        """Chunks of `--max_tokens` tokens, or documents by themselves (`--units`)."""
        from training import texts  # what reads measures alone needs no torch

        cut = texts.chunks if self.options.units == "chunks" else texts.documents
        return cut(format, texts.texts_of(rows), self.options.max_tokens)

    def demo_files(self) -> dict[str, str]:
        return news_files(self.options.demo_items, self.options.data_seed)

    @cached_property
    def sets(self) -> Sets:
        return load_sets(self.corpus, self.options.eval_rows, self.options.trailing_space)

    def evaluate(self, model, format, pieces, progress) -> dict[str, Any]:
        from training.benchmarks.muse.evaluate import evaluate_model  # measures are read without torch

        return evaluate_model(model, format, self.sets, self.options, pieces, progress)

    def summarize(self, measures, retrained=None) -> dict[str, float | None]:
        return summary(measures, retrained)

    def table(self, summary) -> tuple[list[str], list[list[Any]]]:
        """One line per metric: there are too many for one line."""
        shown = {key: column.heading for key, column in self.columns.items() if summary.get(key) is not None}
        return ["number", "value"], [[heading, summary[key]] for key, heading in shown.items()]

    def headline(self, summary) -> str:
        return headline(summary)

    def size(self) -> dict[str, int]:
        return self.sets.sizes()

    def samples(self, measures) -> list[dict[str, str]]:
        """The first rows of VerbMem and KnowMem. Long texts are cut: the prompt at its start, the rest at its end."""
        texts = {"forget_verbmem": ("prompt", "gt"), "forget_knowmem": ("question", "answer")}
        texts["retain_knowmem"] = texts["forget_knowmem"]
        return [
            {
                "set": which.replace("_", " "),
                "question": row[asked] if len(row[asked]) <= SHOWN else f"... {row[asked][-SHOWN:]}",
                "answer": row[true][:SHOWN],
                "generation": row["generation"][:SHOWN],
            }
            for which, (asked, true) in texts.items()
            for row in measures[which][:NUM_SAMPLES]
        ]

    def doubts(self, measures, retrained) -> list[str]:
        return doubts(measures, retrained)

    def check(self, measures) -> None:
        check_measures(measures, self.sets)

    def losses(self, measures, format, number: int):
        from training.texts import documents

        examples = documents(format, self.sets.forget_privleak[:number], self.options.max_tokens)
        means = [row["loss"] for row in measures["forget_privleak"][:number]]
        # of a text, all tokens are scored but the first
        return examples, [mean * max(len(e.labels) - 1, 0) for mean, e in zip(means, examples, strict=True)]

    def read(self, path: Path) -> dict[str, Any]:
        return read_measures(path)

    def key(self) -> str:
        """A hash of the evaluated rows and options. All forget sets of one corpus share it."""
        return fingerprint([self.name, options_in_key(self.options, NOT_MEASURED), self.sets._asdict()])

    def open_unlearning(self, measures, summary) -> dict[str, dict]:
        return exported(measures, summary)
