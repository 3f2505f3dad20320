"""Where the scored positions are: padded and packed batches, the shift, and the compaction of rows.

Every batch is turned into the same flat form (`Positions`): T positions, a target for each, and the range of positions
of each sequence. `compact` then keeps the scored positions only: prompt and padding cost nothing in the products.
The shift rule is here, and once more where both steps are one, in `csrc_triton/compaction.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Target of a row that exists only to fill up to `num_rows`: it scores nothing and receives no gradient.
DEAD_ROW = -1
# Target of a row whose label lies in another rank's part of the vocabulary (`vocab_parallel`).
ELSEWHERE = -2


class Positions(NamedTuple):
    """A batch as T flat positions. Sequence s owns positions offsets[s] to offsets[s+1]."""

    targets: Tensor  # (T,) int64, ignore_index where nothing is scored
    offsets: Tensor  # (B+1,) int64


def flatten(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Positions:
    """Padded (B, S) or packed (T,) labels with cu_seqlens -> flat positions with the shift applied.

    With `shift`, position t is scored on labels[t+1]; the last position of a sequence is scored on nothing, so that
    no pair crosses a boundary even where a collator left the first label of a sequence in place.
    """
    if cu_seqlens is None:
        batch, length = labels.shape
        if shift:
            # min() keeps a batch of zero-length sequences a batch of zero-length sequences
            labels = F.pad(labels[:, 1:], (0, min(1, length)), value=ignore_index)
        offsets = torch.arange(batch + 1, device=labels.device) * length
        return Positions(labels.reshape(-1), offsets)
    offsets = cu_seqlens.to(torch.int64)
    if shift:
        total = labels.shape[0]
        # the clamp keeps a broken cu_seqlens on a GPU from writing out of bounds; `compact` turns it into NaN
        boundary = torch.zeros(total + 1, dtype=torch.bool, device=labels.device)
        boundary = boundary.index_fill(0, offsets.clamp(0, total), True)[1:]
        labels = F.pad(labels[1:], (0, min(1, total)), value=ignore_index)
        labels = labels.masked_fill(boundary, ignore_index)
    return Positions(labels, offsets)


@dataclass(frozen=True)
class Rows:
    """The N scored positions, in order, so that a sequence is a contiguous range of rows."""

    index: Tensor  # (N,) int64 position of each row in the flat batch
    target: Tensor  # (N,) int64 label in [0, V); V = poisoned (the row gives NaN); DEAD_ROW = filling; ELSEWHERE
    sequence: Tensor  # (N,) int64 sequence of each row; B for filling rows
    starts: Tensor  # (B+1,) int64: rows starts[s] to starts[s+1] belong to sequence s
    num_tokens: Tensor  # (B,) int64 rows of each sequence
    host_starts: tuple[int, ...] | None  # starts on the host; None when the caller passed num_rows (no sync)


def compact(targets: Tensor, offsets: Tensor, vocab_size: int, ignore_index: int, num_rows: int | None) -> Rows:
    """Keep the scored positions. One device-to-host copy of B+1 integers, none when `num_rows` is given.

    A label outside [0, V) poisons its row; offsets that are no valid cu_seqlens, or more scored positions than
    `num_rows`, poison every row: no device sync is needed to make the mistake visible.
    """
    targets = targets if offsets.shape[0] > 1 else targets[:0]  # what no sequence owns is not scored
    device, total = targets.device, targets.shape[0]
    scored = targets != ignore_index
    count = F.pad(scored.cumsum(0), (1, 0))  # (T+1,) scored positions before each position
    starts = count[offsets.clamp(0, total)]
    no_offsets = (offsets.diff() < 0).any() | (offsets[0] != 0) | (offsets[-1] != total)
    # then every row is the last sequence's: what follows reads and writes within the rows
    last = torch.arange(starts.shape[0], device=device) == starts.shape[0] - 1
    starts = torch.where(no_offsets, torch.where(last, count[-1], 0), starts)
    host_starts = None
    if num_rows is None:
        host_starts = tuple(starts.tolist())
        num_rows = host_starts[-1]
    num_rows = min(num_rows, total)  # a bound above the number of positions fills nothing more
    # scatter instead of nonzero: the number of rows is known, so the shapes need no further sync
    slot = torch.where(scored, count[1:] - 1, num_rows).clamp(max=num_rows)
    index = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    index.scatter_(0, slot, torch.arange(total, device=device))
    index = index[:num_rows]

    live = torch.arange(num_rows, device=device) < count[-1]
    label = targets[index] if total else torch.zeros_like(index)
    broken = no_offsets | (count[-1] > num_rows)
    out_of_range = (label < 0) | (label >= vocab_size) | broken
    target = torch.where(live, label.masked_fill(out_of_range, vocab_size), DEAD_ROW)
    sequence = torch.bucketize(index, offsets[1:], right=True)
    sequence = torch.where(no_offsets, offsets.shape[0] - 2, sequence)
    sequence = torch.where(live, sequence, offsets.shape[0] - 1)
    starts = starts.clamp(max=num_rows)
    return Rows(index, target, sequence, starts, starts.diff(), host_starts)
