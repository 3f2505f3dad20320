"""Corpora and questions of WMDP and MMLU: from a folder with the published names, the hub, or the demo's generator.

    wmdp-corpora/bio-forget-corpus.jsonl, bio-retain-corpus.jsonl, cyber-forget-corpus.jsonl, cyber-retain-corpus.jsonl
    wmdp-corpora/bio-holdout-corpus.jsonl ...   of the forget corpora's kind, never learned, for membership attacks
    wikitext.jsonl, or .txt with a document a line
    wmdp-bio.json, wmdp-cyber.json, wmdp-chem.json                          or .jsonl
    mmlu/{subject}.json                                                     or .jsonl, or mmlu/test/{subject}_test.csv

A corpus is JSON lines of {"text"}, whatever else an object has (title, abstract), or of strings; where the first line
is no JSON, every line is a document. Sources: arXiv 2403.03218 (WMDP), 2009.03300 (MMLU).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol

from training.benchmarks.wmdp.questions import SUBJECTS, Question, in_words, parse_questions, questions_of

HUB = "cais/wmdp"
DEMO = "demo"
CORPORA, BIO_FORGET = "cais/wmdp-corpora", "cais/wmdp-bio-forget-corpus"  # the latter is given on request
FORGOTTEN = ("bio", "cyber")  # topics with corpora
SPLITS = ("forget", "retain", "holdout")
Kept = Literal["own", "wikitext", "both"]
OLD_NAMES = {"bio-forget-corpus": "bio_remove_dataset", "bio-retain-corpus": "bio_retain_dataset"}
PATTERNS = ("*.jsonl", "*.json", "*.txt", "wmdp-corpora/*.jsonl", "mmlu/*.jsonl", "mmlu/*.json", "mmlu/test/*.csv")


class Source(Protocol):
    """Where corpora and questions come from. What is absent raises ValueError, or is empty where it may be absent."""

    def corpus(self, topic: str, kind: str) -> list[str]:
        """The documents of "forget" or "retain"; of "holdout", none where there are none."""
        ...

    def wikitext(self) -> list[str]: ...

    def wmdp(self, topic: str) -> list[Question]:
        """The questions of a topic; of "chem", none where there are none."""
        ...

    def mmlu(self) -> dict[str, list[Question]]:
        """{subject, as its file is called: its questions}, by name."""
        ...


class Files(NamedTuple):
    """A source of files by their names in the folder `name`."""

    name: str
    entries: Mapping[str, Path | str]  # a file, or the text itself

    def corpus(self, topic: str, kind: str) -> list[str]:
        stem = f"{topic}-{kind}-corpus"
        names = [f"wmdp-corpora/{stem}.jsonl", f"{stem}.jsonl"]
        names += [f"{folder}{OLD_NAMES[stem]}.jsonl" for folder in ("wmdp-corpora/", "") if stem in OLD_NAMES]
        return self._documents(names) if kind != "holdout" or self._find(names) else []

    def wikitext(self) -> list[str]:
        return self._documents(["wikitext.jsonl", "wikitext.txt"])

    def wmdp(self, topic: str) -> list[Question]:
        names = [f"wmdp-{topic}.jsonl", f"wmdp-{topic}.json"]
        if topic not in FORGOTTEN and not self._find(names):
            return []
        name = self._require(names)
        return parse_questions(name, self._read(name), SUBJECTS[topic])

    def mmlu(self) -> dict[str, list[Question]]:
        names = sorted(name for name in self.entries if name.startswith("mmlu/"))
        if not names:
            self._require(["mmlu/{subject}.jsonl", "mmlu/{subject}.json", "mmlu/test/{subject}_test.csv"])
        found: dict[str, list[Question]] = {}
        for name in names:
            stem = PurePosixPath(name).stem
            subject = stem.removesuffix("_test") if name.endswith(".csv") else stem
            for question in parse_questions(name, self._read(name), in_words(subject)):
                found.setdefault(question.subject.replace(" ", "_"), []).append(question)
        return dict(sorted(found.items()))

    def _documents(self, names: Sequence[str]) -> list[str]:
        name = self._require(names)
        return parse_corpus(name, self._read(name))

    def _find(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.entries), None)

    def _require(self, names: Sequence[str]) -> str:
        found = self._find(names)
        if found is None:
            there = ", ".join(sorted(self.entries)[:12]) or "no such files"
            raise ValueError(f"--data_dir {self.name}: expected {' or '.join(names)}, got {there}")
        return found

    def _read(self, name: str) -> str:
        entry = self.entries[name]
        try:
            return entry if isinstance(entry, str) else entry.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--data_dir {self.name}: {name} is not UTF-8: {error}") from None


class Hub(NamedTuple):
    """The published data sets, questions of `name`."""

    name: str = HUB

    def corpus(self, topic: str, kind: str) -> list[str]:
        if kind == "holdout":
            return []
        if (topic, kind) == ("bio", "forget"):
            return _texts(BIO_FORGET, _load(BIO_FORGET, None, "train"))
        return _texts(CORPORA, _load(CORPORA, f"{topic}-{kind}-corpus", "train"))

    def wikitext(self) -> list[str]:
        return _texts("wikitext", _load("Salesforce/wikitext", "wikitext-2-raw-v1", "test"))

    def wmdp(self, topic: str) -> list[Question]:
        config = f"wmdp-{topic}"
        return questions_of(config, _load(self.name, config, "test"), SUBJECTS[topic])

    def mmlu(self) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {}
        for question in questions_of("cais/mmlu", _load("cais/mmlu", "all", "test"), "various subjects"):
            found.setdefault(question.subject.replace(" ", "_"), []).append(question)
        return dict(sorted(found.items()))


def source_named(data_dir: str) -> Source:
    """`demo`, a folder, or a data set of the hub."""
    if data_dir == DEMO:
        from training.benchmarks.wmdp.generate import generate_files

        return Files(DEMO, generate_files())
    folder = Path(data_dir)
    if folder.is_dir():
        paths = sorted(path for pattern in PATTERNS for path in folder.glob(pattern))
        return Files(data_dir, {path.relative_to(folder).as_posix(): path for path in paths})
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data_dir):
        raise ValueError(f"--data_dir {data_dir}: expected a folder, {DEMO}, or a data set of the hub ({HUB})")
    return Hub(data_dir)


def parse_corpus(name: str, text: str) -> list[str]:
    """The documents of a file; ValueError with its name and the line where one is not as expected."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name}: expected documents, got an empty file")
    if name.endswith(".txt") or not isinstance(_json(lines[0][1]), (dict, str)):
        return [line for _, line in lines]
    documents = []
    for number, line in lines:
        value = _json(line)
        found = value.get("text") if isinstance(value, dict) else value
        if not isinstance(found, str):
            expected = 'expected {"text": ...}, as the first line is JSON'
            raise ValueError(f"{name}, line {number}: {expected}, got {line:.160}")
        documents.append(found)
    return documents


def corpora(source: Source, split: str, topics: Sequence[str], kept: Kept, min_chars: int) -> list[list[str]]:
    """Documents of more than `min_chars` characters: a list a topic, of the split "retain" also or only of wikitext."""
    own = split != "retain" or kept != "wikitext"
    found = [source.corpus(topic, split) for topic in topics if own]
    if split == "retain" and kept != "own":
        found.append(source.wikitext())
    long = [[text for text in corpus if len(text) > min_chars] for corpus in found]
    if not all(long) and any(found):
        raise ValueError(f"--min_chars {min_chars}: leaves none of the documents of a corpus ({split})")
    return long


def interleaved(*some: Sequence[str]) -> Iterator[str]:
    """One of each in turn, until all are used up."""
    return (text for text in chain.from_iterable(zip_longest(*some)) if text is not None)


def _json(line: str) -> Any:
    """Its value; None where it is no JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _texts(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise ValueError(f"{name}: expected a column text, got {', '.join(rows[0])}")
    return [row["text"] for row in rows]


def _load(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"--data_dir: reading {name} from the hub needs `datasets`: pip install 'npo-kernels[hub]', or give a "
            "folder with its files"
        ) from None
    try:
        return load_dataset(name, config, split=split).to_list()
    except (OSError, ValueError) as reason:
        advice = "; it is given on request, or choose --topics cyber" if name == BIO_FORGET else ""
        raise ValueError(f"--data_dir: {name} cannot be read from the hub: {reason}{advice}") from None
