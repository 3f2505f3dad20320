"""Question and answer pairs: where they come from, and batches with little or no padding.

`training.templates` makes token ids of them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.authors import PAIRS_PER_AUTHOR, generate_authors
from training.require import require

PLAIN_PROMPT = "Question: {question}\nAnswer:"
PLAIN_ANSWER = " {answer}"
IGNORE_INDEX = -100
HUB = "locuslab/TOFU"
REFUSALS = Path(__file__).with_name("refusals.txt")

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


def load_rows(source: Path | str = HUB, split: str = "full") -> list[dict]:
    """The rows of one of TOFU's configurations, with all their columns.

    Args:
        source: a folder of JSON lines, `{split}.json`, or the id of a data set on the hub, which `datasets` reads.
        split: "full", "forget10", "retain90", "forget10_perturbed", "world_facts", "holdout10", ... Where the source
            has `full` but not the forgetXX or retainXX asked for, it is cut from it: the last XX % of the authors
            are the ones to forget, the others the ones to keep.

    Raises:
        FileNotFoundError: no such folder, or no such split in it.
        ValueError: no such split on the hub, a row without question or answer, parts of authors.
    """
    read = _read_file if Path(source).is_dir() else _read_hub
    try:
        rows = read(source, split)
    except (FileNotFoundError, ValueError) as reason:
        share = re.fullmatch(r"(forget|retain)(\d\d)", split)
        if not share or (read is _read_file and not (Path(source) / "full.json").exists()):
            raise
        try:
            rows = _cut(read(source, "full"), share[1], int(share[2]))
        except ValueError as error:
            raise ValueError(f"{reason}; and of full: {error}") from None
    for number, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and row.get("question") and row.get("answer")):
            raise ValueError(f'{split}, row {number}: expected {{"question": ..., "answer": ...}}, got {row!r}')
    if not rows or (re.fullmatch(r"full|(forget|retain)\d\d", split) and len(rows) % PAIRS_PER_AUTHOR):
        raise ValueError(f"{split}: expected whole authors of {PAIRS_PER_AUTHOR} rows, got {len(rows)} rows")
    return rows


def load_refusals(source: Path | str = HUB) -> list[str]:
    """Answers that say nothing, one a line of `idontknow.jsonl`; ours where the source has none, as on the hub."""
    given = Path(source) / "idontknow.jsonl"
    file = given if given.is_file() else REFUSALS
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file.name}: expected one refusal a line, got an empty file")
    return lines


def _read_file(folder: Path | str, split: str) -> list[dict]:
    path = Path(folder) / f"{split}.json"
    if not path.exists():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.json"))) or "no *.json"
        raise FileNotFoundError(f"{path.name} is not in {path.parent}, which has {found}; name one of these")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_hub(name: Path | str, split: str) -> list[dict]:
    name = str(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{name}: no such folder; expected one of JSON lines, or the id of a data set ({HUB})")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            f"{name} is no folder, and reading it from the hub needs `datasets`: pip install 'npo-kernels[hub]', or "
            "give the folder of its JSON lines"
        ) from None
    return load_dataset(name, split, split="train").to_list()


def _cut(full: list[dict], part: str, percent: int) -> list[dict]:
    num_authors, rest = divmod(len(full) * (percent if part == "forget" else 100 - percent), 100 * PAIRS_PER_AUTHOR)
    if rest or not 0 < num_authors * PAIRS_PER_AUTHOR < len(full):
        raise ValueError(f"{part}{percent:02d} of {len(full) // PAIRS_PER_AUTHOR} authors would not be whole authors")
    cut = len(full) - num_authors * PAIRS_PER_AUTHOR
    return full[cut:] if part == "forget" else full[:cut]


def load_split(data_dir: Path | None, num_authors: int | None, forget_percent: int, seed: int) -> Split:
    """The last `forget_percent` % of the authors are to be forgotten, as in TOFU.

    Without a `data_dir` the authors are generated. With one, TOFU's forgetXX and retainYY are read (`load_rows`), and
    `num_authors` (None: all) keeps the last authors of both, in the same proportion.
    """
    if not 0 < forget_percent < 100:
        raise ValueError(f"forget_percent: expected 1 to 99, got {forget_percent}")
    if data_dir is None:
        num_authors = require(num_authors, "a number of authors, as they are generated")
        rows = generate_authors(num_authors, seed)
        num_forget = _num_forget(num_authors, forget_percent)
        cut = len(rows) - num_forget * PAIRS_PER_AUTHOR
        return Split("generated authors", rows[cut:], rows[:cut])

    forget = load_rows(data_dir, f"forget{forget_percent:02d}")
    retain = load_rows(data_dir, f"retain{100 - forget_percent:02d}")
    available = (len(forget) + len(retain)) // PAIRS_PER_AUTHOR
    num_authors = num_authors or available
    if num_authors > available:
        raise ValueError(f"authors: {num_authors} asked for, but {Path(data_dir).name} has {available}; ask for fewer")
    num_forget = _num_forget(num_authors, forget_percent)
    keep_forget, keep_retain = num_forget * PAIRS_PER_AUTHOR, (num_authors - num_forget) * PAIRS_PER_AUTHOR
    return Split(f"TOFU, forget{forget_percent:02d}", forget[-keep_forget:], retain[-keep_retain:])


def _num_forget(num_authors: int, forget_percent: int) -> int:
    if num_authors < 2:
        raise ValueError(f"authors: expected at least 2, one to forget and one to keep, got {num_authors}")
    return min(num_authors - 1, max(1, round(num_authors * forget_percent / 100)))


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
    parts = (part for row in rows for part in (PLAIN_PROMPT.format(**row), PLAIN_ANSWER.format(**row)))
    bpe.train_from_iterator(parts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


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


def pack(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """The examples one after another in a single row of T tokens, without padding.

    input_ids, labels, position_ids: (1, T) int64, the last one from 0 in every example; cu_seqlens: (B+1,) int32,
    from 0 to T. There is no attention mask: transformers makes a block-causal one of position_ids that restart
    (sdpa, eager), or lets flash attention work on the pieces, provided that no cache is used. The fused head needs
    nothing else.
    """
    lengths = [len(e.input_ids) for e in examples]
    ends = torch.tensor([0, *lengths]).cumsum(0)

    def row(parts: Iterable[Iterable[int]]) -> Tensor:
        return torch.tensor([[i for part in parts for i in part]], device=device)

    return {
        "input_ids": row(e.input_ids for e in examples),
        "labels": row(e.labels for e in examples),
        "position_ids": row(map(range, lengths)),
        "cu_seqlens": ends.to(device=device, dtype=torch.int32),
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


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, without a description of itself
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # the last call's padding and truncation are part of it, and not of the tokenizer
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
