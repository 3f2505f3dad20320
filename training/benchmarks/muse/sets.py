"""MUSE's evaluation sets: texts to continue, questions with prompts, and documents for membership attacks."""

from typing import NamedTuple

from training.benchmarks.muse.data import Corpus


class Continuation(NamedTuple):
    """A row of VerbMem."""

    prompt: str
    gt: str  # how the text goes on


class Asked(NamedTuple):
    """A row of KnowMem."""

    prompt: str  # the examples and the question
    question: str
    answer: str


class Sets(NamedTuple):
    forget_verbmem: list[Continuation]
    forget_knowmem: list[Asked]
    retain_knowmem: list[Asked]
    forget_privleak: list[str]  # documents the target model has learned
    holdout_privleak: list[str]  # and others, which no model has

    def sizes(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._asdict().items()}


def load_sets(corpus: Corpus, rows: int, trailing_space: bool) -> Sets:
    """The first `rows` of each set (0: all), from where `Corpus` finds them."""

    def first(found: list) -> list:
        return found[: rows or len(found)]

    verbmem = [Continuation(**row) for row in corpus.rows("verbmem", "forget")]
    knowmem = [_asked(corpus, part, trailing_space) for part in ("forget", "retain")]
    privleak = [corpus.texts("privleak", split) for split in ("forget", "holdout")]
    return Sets(first(verbmem), *map(first, knowmem), *map(first, privleak))


def _asked(corpus: Corpus, part: str, trailing_space: bool) -> list[Asked]:
    """The prompt of each question: the examples, answered, then the question, to be answered."""
    examples = corpus.rows("knowmem", f"{part}_qa_icl")
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    end = "Answer: " if trailing_space else "Answer:"
    return [
        Asked(f"{shots}Question: {row['question']}\n{end}", row["question"], row["answer"])
        for row in corpus.rows("knowmem", f"{part}_qa")
    ]
