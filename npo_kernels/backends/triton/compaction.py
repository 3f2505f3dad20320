"""Launches of the compaction kernels."""

import torch
from torch import Tensor

from csrc_triton.compaction import count_scored_kernel, gather_rows_kernel, write_rows_kernel
from csrc_triton.tiles import BLOCK_POSITIONS, POSITION_WARPS, ROW_WARPS
from npo_kernels.backends.triton import launch
from npo_kernels.core.layout import Rows


def compact(
    labels: Tensor,  # (B, S) if padded, (T,) if packed
    cu_seqlens: Tensor | None,  # (B+1,) if packed
    shift: bool,
    vocab_size: int,
    ignore_index: int,
    num_rows: int | None,
) -> Rows:
    """The scored positions, in two launches. Without num_rows it makes one device-to-host copy of B+1 integers."""
    labels = labels.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    total, num_sequences = labels.numel(), labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = total if num_sequences else 0  # without sequences, no position belongs to one
    rows = total if num_rows is None else min(num_rows, total)
    blocks = launch.cdiv(total, BLOCK_POSITIONS)
    index, target, sequence = (torch.empty(rows, dtype=torch.int64, device=labels.device) for _ in range(3))
    starts = torch.empty(num_sequences + 1, dtype=torch.int64, device=labels.device)
    num_tokens = torch.empty(num_sequences, dtype=torch.int64, device=labels.device)
    counts = torch.empty(blocks + 1, dtype=torch.int32, device=labels.device)
    length = max(1, labels.shape[-1])  # of padded sequences; at least 1, because kernels divide by it
    steps = num_sequences.bit_length()  # of the bisection: ceil(log2(B + 1))
    constants = {
        "SHIFT": shift, "PACKED": cu_seqlens is not None, "BLOCK_T": BLOCK_POSITIONS, "num_warps": POSITION_WARPS
    }  # fmt: skip
    count_scored_kernel[(blocks + 1,)](
        labels, cu_seqlens, counts, total, num_sequences, length, steps, blocks, ignore_index, **constants
    )
    write_rows_kernel[(blocks + num_sequences + 1,)](
        labels, cu_seqlens, counts, index, target, sequence, starts, num_tokens,
        total, num_sequences, rows, vocab_size, length, steps, blocks, ignore_index, **constants,
    )  # fmt: skip
    if num_rows is not None:
        return Rows(index, target, sequence, starts, num_tokens, None)
    host_starts = tuple(starts.tolist())
    rows = host_starts[-1]
    return Rows(index[:rows], target[:rows], sequence[:rows], starts, num_tokens, host_starts)


def gather_rows(hidden: Tensor, rows: Rows) -> Tensor:
    """(N, H) hidden[rows.index]; padding rows are 0."""
    hidden = launch.rows_contiguous(hidden)
    out = torch.empty(rows.index.shape[0], hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    if out.shape[0]:
        gather_rows_kernel[launch.hidden_grid(out.shape)](
            hidden, rows.index, rows.target, out, hidden.shape[1], hidden.stride(0),
            BLOCK_H=launch.hidden_block(hidden.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip
    return out
