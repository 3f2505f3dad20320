"""Question and answer pairs: loading, tokenising, and batches with little padding.

An example is `<bos>Question: {q}\\nAnswer: {a}<eos>`. Question and answer are tokenised SEPARATELY, so no token spans
both, and the labels score exactly the answer and <eos>; the template (`Answer:` included) is prompt and is masked.
The space before the answer belongs to its first token.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.authors import PAIRS_PER_AUTHOR, generate_authors

PROMPT = "Question: {question}\nAnswer:"
ANSWER = " {answer}"
IGNORE_INDEX = -100

Row = dict[str, str]  # {"question", "answer"}


class Example(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # aligned with input_ids, IGNORE_INDEX on the prompt


@dataclass(frozen=True)
class Split:
    """The authors to forget and the ones to keep; 20 consecutive rows are one author."""

    name: str
    forget: list[Row]
    retain: list[Row]

    @property
    def rows(self) -> list[Row]:
        return self.retain + self.forget


def load_split(data_dir: Path | None, num_authors: int | None, forget_percent: int, seed: int) -> Split:
    """The last `forget_percent` % of the authors are to be forgotten, as in TOFU.

    Without a `data_dir` the authors are generated. With one, TOFU's forgetXX.json and retainYY.json are read, and
    `num_authors` (None: all) keeps the last authors of both files, in the same proportion.
    """
    if not 0 < forget_percent < 100:
        raise ValueError(f"forget_percent: expected 1 to 99, got {forget_percent}")
    if data_dir is None:
        rows = generate_authors(num_authors, seed)
        num_forget = _num_forget(num_authors, forget_percent)
        cut = len(rows) - num_forget * PAIRS_PER_AUTHOR
        return Split("generated authors", rows[cut:], rows[:cut])

    forget = read_json_lines(data_dir / f"forget{forget_percent:02d}.json")
    retain = read_json_lines(data_dir / f"retain{100 - forget_percent:02d}.json")
    available = (len(forget) + len(retain)) // PAIRS_PER_AUTHOR
    num_authors = num_authors or available
    if num_authors > available:
        raise ValueError(f"authors: {num_authors} asked for, but {data_dir.name} has {available}; ask for fewer")
    num_forget = _num_forget(num_authors, forget_percent)
    keep_forget, keep_retain = num_forget * PAIRS_PER_AUTHOR, (num_authors - num_forget) * PAIRS_PER_AUTHOR
    return Split(f"TOFU, forget{forget_percent:02d}", forget[-keep_forget:], retain[-keep_retain:])


def _num_forget(num_authors: int, forget_percent: int) -> int:
    if num_authors < 2:
        raise ValueError(f"authors: expected at least 2, one to forget and one to keep, got {num_authors}")
    return min(num_authors - 1, max(1, round(num_authors * forget_percent / 100)))


def read_json_lines(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, checked for TOFU's schema: {"question", "answer"}, whole authors of 20 rows."""
    if not path.exists():
        found = ", ".join(sorted(p.name for p in path.parent.glob("forget*.json"))) or "no forget*.json"
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}, which has {found}; see --data_dir, --forget_percent"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and row.get("question") and row.get("answer")):
            raise ValueError(f'{path.name}, row {number}: expected {{"question": ..., "answer": ...}}, got {row!r}')
    if not rows or len(rows) % PAIRS_PER_AUTHOR:
        raise ValueError(f"{path.name}: expected whole authors of {PAIRS_PER_AUTHOR} rows, got {len(rows)} rows")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def sample_authors(rows: list[Row], num_authors: int, seed: int) -> list[Row]:
    """All rows of `num_authors` seeded authors, in the order of `rows`."""
    total = len(rows) // PAIRS_PER_AUTHOR
    picked = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num_authors].sort().values
    return [row for a in picked.tolist() for row in rows[a * PAIRS_PER_AUTHOR : (a + 1) * PAIRS_PER_AUTHOR]]


def train_tokenizer(rows: list[Row], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the text itself: no unknown tokens, and short answers even with a small vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([part for row in rows for part in (PROMPT.format(**row), ANSWER.format(**row))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    examples = []
    for row in rows:
        prompt = [tokenizer.bos_token_id, *tokenizer.encode(PROMPT.format(**row), add_special_tokens=False)]
        answer = [*tokenizer.encode(ANSWER.format(**row), add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer))
    return examples


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels: (B, S) int64, padded on the right to the longest example."""
    longest = max(len(e.input_ids) for e in examples)

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([e.input_ids for e in examples], pad_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORE_INDEX),
    }


def shuffled_batches(
    examples: Sequence[Example], batch_size: int, generator: torch.Generator, pool: int = 16
) -> Iterator[list[int]]:
    """Indices of one epoch, every example once, in batches of similar length.

    Within a random pool of `pool` batches examples are sorted by length, which removes nearly all padding (at
    batch 16 random batches of TOFU are one third padding); then the batches are shuffled. pool=1: plain shuffling.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), batch_size * pool):
        members = sorted(order[start : start + batch_size * pool], key=lambda i: len(examples[i].input_ids))
        batches += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[i]


def data_hash(examples: Sequence[Example]) -> str:
    """sha256 of what the model sees: token ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
