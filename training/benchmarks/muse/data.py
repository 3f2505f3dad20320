"""The texts of MUSE: a folder in the layout of its repository, its data sets of the hub, or a generated corpus.

    raw/       forget, retain1, retain2, holdout     documents
    scal/      forget_1 ... forget_4                 forget sets, each with all documents of the one before
    sust/      forget_1 ... forget_4                 disjoint forget sets, requests that come one after another
    verbmem/   forget                                {"prompt", "gt"}: what comes before a text, and the text
    knowmem/   forget_qa, retain_qa, *_icl           {"question", "answer"}; *_icl: the examples of the prompt
    privleak/  forget, holdout                       documents that the target model has seen, and has not

A file is `SUBSET/SPLIT.json`, an array or lines of JSON (`.jsonl` as well); a document is a string or {"text"}, and
`raw/SPLIT.txt` is a single one. MUSE-News has all subsets, MUSE-Books neither scal nor sust.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

HUB = "muse-bench/MUSE-News"
DEMO = "demo"
RAW = ("forget", "retain1", "retain2", "holdout")
REQUESTS = (1, 2, 3, 4)
SCAL, SUST = (tuple(f"{subset}_{k}" for k in REQUESTS) for subset in ("scal", "sust"))
FORGET_SETS = ("forget", *SCAL, *SUST)
FIELDS = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer")}  # of the other subsets: ("text",)
SUFFIXES = (".json", ".jsonl", ".txt")
# The repository's names of what the hub calls retain_qa.
ALSO = {"retain_qa": ("retain2_qa",), "retain_qa_icl": ("retain2_qa_icl",)}


class AbsentError(ValueError):
    """The source does not have this subset or split."""


class Corpus:
    """The rows of all subsets.

    Args:
        source: a folder, the id of a data set on the hub, or "demo", which reads `demo`.
        demo: the files of a generated corpus, {"raw/forget.json": its text}.

    Raises:
        ValueError: no such folder or data set; of `rows`: no such split, a file without JSON, rows without fields.
    """

    def __init__(self, source: str, demo: Mapping[str, str]):
        self.source, self.folder = source, Path(source)
        self.files = dict(demo) if source == DEMO else None
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
        if self.files is None and not self.folder.is_dir() and not is_id:
            raise ValueError(
                f"--data_dir {source}: no such folder; expected one with raw/forget.json and so on, the id of a data "
                f"set ({HUB}), or {DEMO}"
            )

    def rows(self, subset: str, split: str) -> list[dict[str, str]]:
        """Rows with the fields of the subset and no others; `AbsentError` where there is no such split."""
        fields = FIELDS.get(subset, ("text",))
        names = (split, *ALSO.get(split, ()))
        for name in names:
            try:
                found = self._found(subset, name)
            except AbsentError as reason:
                absent = reason
            else:
                return _checked(found, fields, f"--data_dir {self.source}: {subset}/{name}")
        raise absent if len(names) == 1 else AbsentError(f"{absent} (nor {' nor '.join(names[:-1])})")

    def texts(self, subset: str, split: str) -> list[str]:
        return [row["text"] for row in self.rows(subset, split)]

    def forget_set(self, name: str) -> list[str]:
        """The documents of one of `FORGET_SETS`; ValueError where there is no such."""
        if name not in FORGET_SETS:
            raise ValueError(f"--forget_set: expected one of {', '.join(FORGET_SETS)}, got {name!r}")
        subset, _, number = name.rpartition("_")
        return self.texts(subset, f"forget_{number}") if subset else self.texts("raw", "forget")

    @cached_property
    def forgettable(self) -> list[str]:
        """All documents of all forget sets, each once. The target model must have learned them."""
        found: dict[str, None] = {}
        for name in FORGET_SETS:
            try:
                found |= dict.fromkeys(self.forget_set(name))
            except AbsentError:
                if name == "forget":
                    raise
        return list(found)

    def _found(self, subset: str, split: str) -> list[Any]:
        if self.files is None and not self.folder.is_dir():
            return self._of_hub(subset, split)
        there = set(self._names())
        for suffix in SUFFIXES:
            name = f"{subset}/{split}{suffix}"
            if name in there:
                text = self.files[name] if self.files is not None else (self.folder / name).read_text(encoding="utf-8")
                return [text] if suffix == ".txt" else _parsed(text, f"--data_dir {self.source}: {name}")
        found = ", ".join(sorted(there)) or "no *.json in a folder of its own"
        raise AbsentError(f"--data_dir {self.source}: {subset}/{split}.json is not there; it has {found}")

    def _names(self) -> Iterator[str]:
        if self.files is not None:
            yield from self.files
            return
        for path in self.folder.glob("*/*"):
            if path.suffix in SUFFIXES:
                yield path.relative_to(self.folder).as_posix()

    def _of_hub(self, subset: str, split: str) -> list[Any]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError(
                f"--data_dir {self.source} is no folder, and reading it from the hub needs `datasets`: pip install "
                "'npo-kernels[hub]', or give the folder of its files"
            ) from None
        try:
            return load_dataset(self.source, subset, split=split).to_list()
        except ValueError as reason:  # no such configuration, or no such split in it
            raise AbsentError(f"--data_dir {self.source} has no {subset}/{split}: {reason}") from None


def _parsed(text: str, where: str) -> list[Any]:
    """A JSON array, or JSON lines."""
    try:
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]  # texts may hold other line ends
    except json.JSONDecodeError as reason:
        raise ValueError(f"{where}: expected a JSON array, or a JSON value a line, got neither ({reason})") from None
    return found if isinstance(found, list) else [found]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _checked(found: list[Any], fields: tuple[str, ...], where: str) -> list[dict[str, str]]:
    if not found:
        raise ValueError(f"{where}: expected at least one row, got none")
    rows = []
    for number, row in enumerate(found, 1):
        if fields == ("text",) and isinstance(row, str):
            row = {"text": row}
        if not (isinstance(row, dict) and all(_is_text(row.get(field)) for field in fields)):
            wanted = ", ".join(f'"{field}"' for field in fields)
            shown = repr(row)
            raise ValueError(
                f"{where}, row {number}: expected texts under {wanted}, got {shown[:120]}{'...' * (len(shown) > 120)}"
            )
        rows.append({field: row[field] for field in fields})
    return rows
