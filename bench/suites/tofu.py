"""Batches of TOFU: 32 answers to forget and 32 to retain in one loss, padded, prompts ignored, at three heads.

The lengths are those of real question and answer pairs, from `--data_dir` (or NPO_DATA_DIR), else from the committed
tofu_lengths.json; both count tokens of the byte-level BPE of 4096 entries that `training.tokenizer` trains on the text.
`python -m bench.suites.tofu DIR` writes the table.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.cases import HEADS, Case
from bench.measure import time_case
from bench.memory import isolated
from bench.options import Options
from bench.records import Record, write_text

TABLE = Path(__file__).with_name("tofu_lengths.json")
MODELS = ("llama-2-7b", "llama-3.2-1b", "smollm2-135m")
SEQUENCES = 32  # of each kind
VOCABULARY = 4096

Lengths = dict[str, list[tuple[int, int]]]  # "forget", "retain" -> (prompt, answer) tokens of each pair


def lengths_of(data_dir: Path) -> Lengths:
    """Of forget10.json and retain90.json, the end token included; the last prompt position predicts the first token."""
    from training.benchmarks.authors import load_split
    from training.templates import Format
    from training.tokenizer import train_tokenizer

    split = load_split(data_dir, 0, 10, seed=0)
    tokenizer = train_tokenizer(split.retain + split.forget, VOCABULARY)

    def measured(rows: list[dict[str, str]]) -> list[tuple[int, int]]:
        scored = (
            (len(e.labels), sum(label >= 0 for label in e.labels)) for e in Format(tokenizer, "plain").encode(rows)
        )
        return [(total - answer - 1, answer) for total, answer in scored]

    return {"forget": measured(split.forget), "retain": measured(split.retain)}


def sampled(lengths: Lengths, count: int, seed: int = 0) -> tuple[tuple[int, int], ...]:
    """`count` of each kind, forget first."""
    rng = random.Random(seed)
    pairs = (pair for kind in ("forget", "retain") for pair in rng.sample(lengths[kind], count))
    return tuple((prompt, answer) for prompt, answer in pairs)  # lists, if they come from the table


def cases(options: Options) -> tuple[list[Case], str]:
    """The cases, and the source of their lengths."""
    folder = options.data_dir or os.environ.get("NPO_DATA_DIR")
    count, models = (3, ("toy",)) if options.toy else (SEQUENCES, MODELS)
    if folder and not options.toy:
        folder = Path(folder)
        folder = folder / "tofu" if (folder / "tofu").is_dir() else folder
        lengths, source = sampled(lengths_of(folder), count), "tofu"
    else:
        lengths, source = sampled(json.loads(TABLE.read_text()), count), "tofu_lengths.json"
    return [Case(f"{model}/tofu", HEADS[model], lengths, retain=count, data="random") for model in models], source


def run(options: Options) -> Iterator[Record]:
    found, source = cases(options)
    for case in options.chosen(found):
        note = f"lengths: {source}"
        yield from time_case(options, case, note=note)
        yield from isolated(options, [case], reps=1 if options.toy else 3, note=note)


def main(data_dir: Path) -> None:
    """Write the table: 64 pairs of each kind."""
    lengths = lengths_of(data_dir)
    rng = random.Random(0)
    table = {kind: rng.sample(pairs, 64) for kind, pairs in lengths.items()}
    write_text(TABLE, json.dumps(table) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
