"""Compaction: the scored positions of a batch and their hidden states."""

from torch import Tensor

from npo_kernels.core import layout
from npo_kernels.core.layout import PADDING_ROW, Rows


def compact(
    labels: Tensor,  # (B, S) if padded, (T,) if packed
    cu_seqlens: Tensor | None,  # (B+1,) if packed
    shift: bool,
    vocab_size: int,
    ignore_index: int,
    num_rows: int | None,
) -> Rows:
    """The scored positions. Without num_rows it makes one device-to-host copy of B+1 integers."""
    positions = layout.flatten(labels, cu_seqlens, shift, ignore_index)
    return layout.compact(*positions, vocab_size, ignore_index, num_rows)


def gather_rows(hidden: Tensor, rows: Rows) -> Tensor:
    """(N, H) hidden[rows.index]; padding rows are 0. There are none if the number of rows is known on the host."""
    x = hidden[rows.index]
    return x if rows.host_starts is not None else x.masked_fill_((rows.target == PADDING_ROW).unsqueeze(1), 0)
