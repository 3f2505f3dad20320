"""From a batch to its rows."""

from torch import Tensor

from npo_kernels.core import layout
from npo_kernels.core.layout import DEAD_ROW, Rows


def compact(
    labels: Tensor,  # (B, S), or (T,) with
    cu_seqlens: Tensor | None,  # (B+1,)
    shift: bool,
    vocab_size: int,
    ignore_index: int,
    num_rows: int | None,
) -> Rows:
    """The scored positions; one device-to-host copy of B+1 integers if num_rows is not given."""
    positions = layout.flatten(labels, cu_seqlens, shift, ignore_index)
    return layout.compact(*positions, vocab_size, ignore_index, num_rows)


def gather_rows(hidden: Tensor, rows: Rows) -> Tensor:
    """(N, H) hidden[rows.index]; filling rows, which there are none of if the host knows their number, are 0."""
    x = hidden[rows.index]
    return x if rows.host_starts is not None else x.masked_fill_((rows.target == DEAD_ROW).unsqueeze(1), 0)
