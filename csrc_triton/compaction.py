"""Compaction: find the scored positions of a batch, their labels and sequences, and gather their hidden states.

Sequence s covers the positions [offsets[s], offsets[s+1]). Its position t is scored on

    label_t = labels[t+1] if t + 1 < offsets[s+1] else ignore_index      (shift)
            = labels[t]                                                  (no shift)

Row i is the i-th position whose label is not ignore_index. There are two launches over blocks of BLOCK_T positions. The
first counts the scored positions of each block. In the second, every program sums the counts of the blocks before its
own, which are few, and writes its rows. The result does not depend on the order of the programs, nothing synchronizes
with the host, and one long sequence costs as much as many short ones of the same total length.

The offsets are cu_seqlens of a packed batch, or s * length for a padded one (PACKED = False). The sequence of a
position is found by bisecting the offsets. Reads 16T bytes (and log2(B) cached offsets per position), writes
24N + 16B bytes.
"""

import triton
import triton.language as tl


@triton.jit
def _offset(offsets_ptr, sequence, length, T, PACKED: tl.constexpr):
    """First position of a sequence, clamped to [0, T] so that an invalid cu_seqlens reads nothing outside the batch."""
    if PACKED:
        offset = tl.load(offsets_ptr + sequence).to(tl.int64)
        return tl.minimum(tl.maximum(offset, 0), T)
    else:
        return tl.minimum(sequence.to(tl.int64) * length, T)


@triton.jit
def _sequence_of(positions, offsets_ptr, B, length, steps, PACKED: tl.constexpr):
    """Sequence of each position: the number of sequences that end at or before it.

    Bisection in steps = ceil(log2(B + 1)).
    """
    if PACKED:
        low = tl.zeros_like(positions)
        high = low + B
        for _ in range(0, steps):
            middle = (low + high) // 2  # equals high once low == high
            end = tl.load(offsets_ptr + 1 + middle, mask=low < high, other=0).to(tl.int64)
            ended = (low < high) & (end <= positions)
            low = tl.where(ended, middle + 1, low)
            high = tl.where(ended, high, middle)
        return low
    else:
        return positions // length


@triton.jit
def _labels_at(
    positions, labels_ptr, sequence, offsets_ptr, B, length, T, ignore_index, SHIFT: tl.constexpr, PACKED: tl.constexpr
):
    """Label that each position is scored on; ignore_index beyond T."""
    if SHIFT:
        end = _offset(offsets_ptr, tl.minimum(sequence, B - 1) + 1, length, T, PACKED)
        return tl.load(labels_ptr + positions + 1, mask=positions + 1 < end, other=ignore_index)
    else:
        return tl.load(labels_ptr + positions, mask=positions < T, other=ignore_index)


@triton.jit
def _sum_counts(counts_ptr, end, BLOCK_COUNTS: tl.constexpr):
    """Number of scored positions in the first `end` blocks."""
    total = tl.zeros((BLOCK_COUNTS,), dtype=tl.int64)
    for first in range(0, end, BLOCK_COUNTS):
        blocks = first + tl.arange(0, BLOCK_COUNTS)
        total += tl.load(counts_ptr + blocks, mask=blocks < end, other=0).to(tl.int64)
    return tl.sum(total, axis=0)


# These sizes change from batch to batch. Without specialization, a size that happens to be 1 or a multiple of 16 does
# not trigger another compilation.
SIZES = ("T", "B", "N", "V", "length", "steps", "blocks", "ignore_index")


@triton.jit(do_not_specialize=SIZES)
def count_scored_kernel(
    labels_ptr,  # (T,) int64
    offsets_ptr,  # (B+1,) int32 or int64, if PACKED
    counts_ptr,  # (blocks + 1,) int32, out: scored positions of each block; last entry 1 if the offsets are invalid
    T,
    B,
    length,
    steps,
    blocks,
    ignore_index,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Count the scored positions of each block, and validate the offsets. Grid: blocks + 1; the last one validates."""
    block = tl.program_id(0)
    if block < blocks:
        positions = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        sequence = _sequence_of(positions, offsets_ptr, B, length, steps, PACKED)
        label = _labels_at(positions, labels_ptr, sequence, offsets_ptr, B, length, T, ignore_index, SHIFT, PACKED)
        tl.store(counts_ptr + block, tl.sum((label != ignore_index).to(tl.int32), axis=0))
    else:
        broken = tl.zeros((BLOCK_T,), dtype=tl.int32)
        if PACKED:
            for first in range(0, B + 1, BLOCK_T):
                at = first + tl.arange(0, BLOCK_T)
                offset = tl.load(offsets_ptr + at, mask=at <= B, other=0).to(tl.int64)
                after = tl.load(offsets_ptr + at + 1, mask=at < B, other=0).to(tl.int64)
                wrong = ((at < B) & (after < offset)) | ((at == 0) & (offset != 0)) | ((at == B) & (offset != T))
                broken = tl.maximum(broken, wrong.to(tl.int32))
        tl.store(counts_ptr + blocks, tl.max(broken, axis=0))


@triton.jit(do_not_specialize=SIZES)
def write_rows_kernel(
    labels_ptr,  # (T,) int64
    offsets_ptr,  # (B+1,) int32 or int64, if PACKED
    counts_ptr,  # (blocks + 1,) int32
    index_ptr,  # (N,) int64, out: position of each row; 0 for a padding row
    target_ptr,  # (N,) int64, out: label of each row; V (poisoned) if it is invalid; -1 for a padding row
    sequence_ptr,  # (N,) int64, out: sequence of each row; B for a padding row
    starts_ptr,  # (B+1,) int64, out: first row of each sequence
    num_tokens_ptr,  # (B,) int64, out: rows of each sequence
    T,
    B,
    N,
    V,
    length,
    steps,
    blocks,
    ignore_index,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the rows, and the first row and row count of each sequence. Grid: blocks of positions, then B + 1.

    Invalid offsets, or more than N scored positions, poison every row. Rows beyond the last scored position are padding
    (the caller's num_rows may be larger than the number of scored positions).
    """
    program = tl.program_id(0)
    if program < blocks:
        before = _sum_counts(counts_ptr, program, BLOCK_T)
        total = _sum_counts(counts_ptr, blocks, BLOCK_T)
        broken = (tl.load(counts_ptr + blocks) != 0) | (total > N)
        positions = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        sequence = _sequence_of(positions, offsets_ptr, B, length, steps, PACKED)
        label = _labels_at(positions, labels_ptr, sequence, offsets_ptr, B, length, T, ignore_index, SHIFT, PACKED)
        scored = label != ignore_index
        if PACKED:  # invalid offsets: assign all rows to the last sequence
            sequence = tl.where(tl.load(counts_ptr + blocks) != 0, B - 1, sequence)
        row = before + tl.cumsum(scored.to(tl.int32), axis=0) - 1
        written = scored & (row < N)
        wrong = (label < 0) | (label >= V) | broken
        tl.store(index_ptr + row, positions, mask=written)
        tl.store(target_ptr + row, tl.where(wrong, V, label), mask=written)
        tl.store(sequence_ptr + row, sequence, mask=written)
        # N <= T, so every row number is also a position number: each program writes the padding rows of its own block
        filling = (positions >= total) & (positions < N)
        tl.store(index_ptr + positions, tl.zeros_like(positions), mask=filling)
        tl.store(target_ptr + positions, tl.zeros_like(positions) - 1, mask=filling)
        tl.store(sequence_ptr + positions, tl.zeros_like(positions) + B, mask=filling)
    else:
        owner = program - blocks
        start = _rows_before(
            owner, labels_ptr, offsets_ptr, counts_ptr, T, B, N, length, steps, blocks, ignore_index, SHIFT, PACKED,
            BLOCK_T,
        )  # fmt: skip
        tl.store(starts_ptr + owner, start)
        if owner < B:
            end = _rows_before(
                owner + 1, labels_ptr, offsets_ptr, counts_ptr, T, B, N, length, steps, blocks, ignore_index, SHIFT,
                PACKED, BLOCK_T,
            )  # fmt: skip
            tl.store(num_tokens_ptr + owner, end - start)


@triton.jit
def _rows_before(
    owner, labels_ptr, offsets_ptr, counts_ptr, T, B, N, length, steps, blocks, ignore_index,
    SHIFT: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Number of rows before a sequence. If the offsets are invalid, the last sequence owns all rows."""
    offset = _offset(offsets_ptr, owner, length, T, PACKED)
    block = offset // BLOCK_T
    positions = block * BLOCK_T + tl.arange(0, BLOCK_T)
    sequence = _sequence_of(positions, offsets_ptr, B, length, steps, PACKED)
    label = _labels_at(positions, labels_ptr, sequence, offsets_ptr, B, length, T, ignore_index, SHIFT, PACKED)
    scored = (label != ignore_index) & (positions < offset)
    before = _sum_counts(counts_ptr, block, BLOCK_T) + tl.sum(scored.to(tl.int32), axis=0)
    if PACKED:
        if tl.load(counts_ptr + blocks) != 0:
            before = tl.where(owner < B, 0, _sum_counts(counts_ptr, blocks, BLOCK_T))
    return tl.minimum(before, N)


@triton.jit
def gather_rows_kernel(
    hidden_ptr,  # (T, H)
    index_ptr,  # (N,) int64
    target_ptr,  # (N,) int64
    out_ptr,  # (N, H) contiguous, out
    H,
    stride_hidden,
    BLOCK_H: tl.constexpr,
):
    """out_i = hidden[index_i]; 0 for a padding row, even if hidden is not finite at its index.

    Grid: rows x blocks of H. Moves 2NH elements.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    live = tl.load(target_ptr + row) != -1
    at = tl.load(index_ptr + row) * stride_hidden
    x = tl.load(hidden_ptr + at + columns, mask=inside & live, other=0.0)
    tl.store(out_ptr + row * H + columns, x, mask=inside)
