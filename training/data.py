"""Batches of token ids with little or no padding.

Token ids come from `training.templates`, question and answer pairs from a benchmark.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

Row = dict[str, str]  # {"question", "answer"}, or {"text"} of a corpus


class Example(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # aligned with input_ids, IGNORE_INDEX on the prompt


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


def next_labels(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The target of each position: labels[t+1], and IGNORE_INDEX at the last position of a sequence."""
    following = labels.roll(-1, -1)
    if cu_seqlens is None:
        following[:, -1] = IGNORE_INDEX
    else:
        following[cu_seqlens[1:].long() - 1] = IGNORE_INDEX  # a packed batch has no empty sequences
    return following


def row_of_position(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 of the shape of labels, (B, S) or packed (T,): the row of each position."""
    if cu_seqlens is None:
        return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=labels.device), lengths)


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
