"""Score several answers to one question in one row that contains the question once.

The row has the prompt without its last token, then for every answer that token and the answer. A token attends to the
prompt and its own answer, and has the position that it would have in a separate row, so the log-probabilities are the
same up to rounding. With n answers this saves n - 1 prompts.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from npo_kernels import token_logprobs
from training import distributed
from training.data import IGNORE_INDEX, Example, next_labels
from training.interruption import check_alone
from training.model import autocast, check_length
from training.progress import OnRows, nothing
from training.scoring import Scores, score

TAKES_MASKS = ("sdpa", "eager")  # attention that takes a mask of its own for every pair of tokens


def score_answers(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Example]],
    pad_id: int,
    batch_size: int = 64,
    on_rows: OnRows = nothing,
) -> Scores:
    """Scores of all examples, group by group in their order. The examples of a group have the same prompt.

    Where the attention takes no such mask, or looks back only so far, or in several processes, every example has a row
    of its own (`training.scoring.score`). Rows have about `batch_size` examples together.
    """
    examples = list(chain.from_iterable(groups))
    if not groups or not _takes_masks(model) or distributed.count() > 1:
        return score(model, examples, pad_id, batch_size, on_rows=on_rows)
    check_length(model, max(len(e.input_ids) for e in examples), "an example")
    was_training = model.training
    model.eval()
    rows = [_Row(group) for group in groups]
    logps: list[list[float]] = [[] for _ in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    at_once = max(1, batch_size * len(groups) // len(examples))
    for start in range(0, len(rows), at_once):
        members = by_length[start : start + at_once]
        batch = [rows[i] for i in members]
        for i, found in zip(members, _logps(model, batch, pad_id), strict=True):
            logps[i] = found
        on_rows(sum(len(row.counts) for row in batch), sum(len(row.input_ids) for row in batch))
        check_alone()
    model.train(was_training)
    counts = torch.tensor([count for row in rows for count in row.counts], dtype=torch.int64)
    return Scores(torch.tensor(list(chain.from_iterable(logps))), counts)


class _Row:
    """A group as one row. `segment` is 0 in the prompt, then the number of the answer."""

    def __init__(self, group: Sequence[Example]):
        cut = _prompt_length(group[0]) - 1
        prompt = group[0].input_ids[:cut]
        if any(_prompt_length(e) - 1 != cut or e.input_ids[: cut + 1] != group[0].input_ids[: cut + 1] for e in group):
            raise ValueError("answers that share a row: expected the same prompt before each of them")
        self.input_ids, self.labels = list(prompt), [IGNORE_INDEX] * cut
        self.positions, self.segment = list(range(cut)), [0] * cut
        self.counts = []
        for number, example in enumerate(group, 1):
            ids, labels = example.input_ids[cut:], example.labels[cut:]
            self.input_ids += ids
            self.labels += labels
            self.positions += range(cut, cut + len(ids))
            self.segment += [number] * len(ids)
            self.counts.append(sum(label != IGNORE_INDEX for label in labels))


def _prompt_length(example: Example) -> int:
    return next(i for i, label in enumerate([*example.labels[1:], 0], 1) if label != IGNORE_INDEX)


@torch.no_grad()
def _logps(model: PreTrainedModel, rows: Sequence[_Row], pad_id: int) -> list[list[float]]:
    """[summed log-probability of each answer] of each row."""
    device, longest = model.device, max(len(row.input_ids) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in values], device=device)

    labels = padded([row.labels for row in rows], IGNORE_INDEX)
    segment = padded([row.segment for row in rows], -1)
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    sees = same & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=device)
    mask.masked_fill_(~sees, torch.finfo(model.dtype).min)
    kept: list[Tensor] = []

    def keep(hidden: Tensor, lm_head_weight: Tensor, labels: Tensor, **options) -> Tensor:
        kept.append(token_logprobs(hidden, lm_head_weight, labels, **options))
        return kept[0].sum()

    with autocast(model):
        model(
            input_ids=padded([row.input_ids for row in rows], pad_id),
            attention_mask=mask[:, None],
            position_ids=padded([row.positions for row in rows], 0),
            labels=labels,
            fused_unlearning=keep,
        )
    scored = next_labels(labels, None) != IGNORE_INDEX
    sums = torch.zeros(len(rows), max(len(row.counts) for row in rows) + 1, dtype=torch.float64, device=device)
    sums.scatter_add_(1, segment.clamp(min=0), kept[0].double().where(scored, 0.0))
    return [values[1 : len(row.counts) + 1] for row, values in zip(rows, sums.float().tolist(), strict=True)]


def _takes_masks(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    looks_back = getattr(config, "sliding_window", None) is not None or any(
        kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()
    )
    return config._attn_implementation in TAKES_MASKS and not looks_back
