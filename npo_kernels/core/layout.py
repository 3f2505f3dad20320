"""Batch layout: padded and packed batches, the label shift, and the compaction to scored rows.

Every batch is converted to the same flat form (`Positions`): T positions, a target for each, and the range of positions
of each sequence. `compact` then keeps only the scored positions, so prompt and padding tokens cost nothing in the
matrix products. `csrc_triton/compaction.py` does both steps in one and repeats the shift rule.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Target of a padding row: one beyond the last scored position, if `num_rows` is larger than their number. It is not
# scored and gets no gradient.
PADDING_ROW = -1
# Target of a row whose label is in another rank's shard of the vocabulary (`vocab_parallel`).
OTHER_RANK = -2


class Positions(NamedTuple):
    """A batch as T flat positions. Sequence s has the positions [offsets[s], offsets[s+1])."""

    targets: Tensor  # (T,) int64, ignore_index where nothing is scored
    offsets: Tensor  # (B+1,) int64


def flatten(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Positions:
    """Flat positions, with the shift applied, from padded labels (B, S) or packed labels (T,) with cu_seqlens.

    With `shift`, position t is scored on labels[t+1]. The last position of a sequence is never scored, so no pair
    crosses a sequence boundary, even if a collator left the first label of a sequence in place.
    """
    if cu_seqlens is None:
        batch, length = labels.shape
        if shift:
            # min() for length 0: nothing to pad
            labels = F.pad(labels[:, 1:], (0, min(1, length)), value=ignore_index)
        offsets = torch.arange(batch + 1, device=labels.device) * length
        return Positions(labels.reshape(-1), offsets)
    offsets = cu_seqlens.to(torch.int64)
    if shift:
        total = labels.shape[0]
        # the clamp keeps an invalid cu_seqlens on a GPU from writing out of bounds; `compact` makes the result NaN
        boundary = torch.zeros(total + 1, dtype=torch.bool, device=labels.device)
        boundary = boundary.index_fill(0, offsets.clamp(0, total), True)[1:]
        labels = F.pad(labels[1:], (0, min(1, total)), value=ignore_index)
        labels = labels.masked_fill(boundary, ignore_index)
    return Positions(labels, offsets)


@dataclass(frozen=True)
class Rows:
    """The N scored positions in order; each sequence is a contiguous range of rows."""

    index: Tensor  # (N,) int64 position of each row in the flat batch
    target: Tensor  # (N,) int64 label in [0, V); V: poisoned (the row gives NaN); PADDING_ROW: padding row; OTHER_RANK
    sequence: Tensor  # (N,) int64 sequence of each row; B for padding rows
    starts: Tensor  # (B+1,) int64: the rows [starts[s], starts[s+1]) belong to sequence s
    num_tokens: Tensor  # (B,) int64 number of rows of each sequence
    host_starts: tuple[int, ...] | None  # starts on the host; None if the caller passed num_rows (no sync)


def compact(targets: Tensor, offsets: Tensor, vocab_size: int, ignore_index: int, num_rows: int | None) -> Rows:
    """Keep the scored positions. Makes one device-to-host copy of B+1 integers, none if `num_rows` is given.

    A label outside [0, V) poisons its row, which then gives NaN. Invalid offsets, or more scored positions than
    `num_rows`, poison every row. This makes mistakes visible without a device sync.
    """
    targets = targets if offsets.shape[0] > 1 else targets[:0]  # without sequences, no position belongs to one
    device, total = targets.device, targets.shape[0]
    scored = targets != ignore_index
    count = F.pad(scored.cumsum(0), (1, 0))  # (T+1,) scored positions before each position
    starts = count[offsets.clamp(0, total)]
    no_offsets = (offsets.diff() < 0).any() | (offsets[0] != 0) | (offsets[-1] != total)
    # invalid offsets: assign every row to the last sequence, so that later steps stay within the rows
    last = torch.arange(starts.shape[0], device=device) == starts.shape[0] - 1
    starts = torch.where(no_offsets, torch.where(last, count[-1], 0), starts)
    host_starts = None
    if num_rows is None:
        host_starts = tuple(starts.tolist())
        num_rows = host_starts[-1]
    num_rows = min(num_rows, total)  # never more rows than positions
    # scatter instead of nonzero, which would sync although the number of rows is known
    slot = torch.where(scored, count[1:] - 1, num_rows).clamp(max=num_rows)
    index = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    index.scatter_(0, slot, torch.arange(total, device=device))
    index = index[:num_rows]

    live = torch.arange(num_rows, device=device) < count[-1]
    label = targets[index] if total else torch.zeros_like(index)
    broken = no_offsets | (count[-1] > num_rows)
    out_of_range = (label < 0) | (label >= vocab_size) | broken
    target = torch.where(live, label.masked_fill(out_of_range, vocab_size), PADDING_ROW)
    sequence = torch.bucketize(index, offsets[1:], right=True)
    sequence = torch.where(no_offsets, offsets.shape[0] - 2, sequence)
    sequence = torch.where(live, sequence, offsets.shape[0] - 1)
    starts = starts.clamp(max=num_rows)
    return Rows(index, target, sequence, starts, starts.diff(), host_starts)
