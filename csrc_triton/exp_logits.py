"""The streaming projection: a product with the head whose epilogue is the anchored exponential.

    E_iv = exp(z_iv - a_i),  E_{i,y_i} = 0,  z_iv = cap(logit_scale * (x_i . W_v + b_v))

Replaces, for one slice of the vocabulary and without z,

    z = cap(logit_scale * (x @ W.T + b).float())
    E = torch.exp(z - anchor[:, None]).scatter(1, y[:, None], 0)
    sums, maxima = E.sum(1), z.amax(1)

Tiles: BLOCK_N rows x a split of SPLIT_TILES consecutive BLOCK_V-wide tiles are one piece of work; the float32
accumulator of a tile goes through the exponential in registers, in PIECES one after the other, so that what is between
finds room beside it. Nothing but the stored slab (STORE, in the dtype of x) and two floats per row and split (SUMS,
MAXIMA) is written. Splits start at multiples of SPLIT_TILES * BLOCK_V columns, whatever N is, and are reduced in order
afterwards: the log-probability of a row does not depend on its batch.

Grid: `exp_logits_kernel` has a program for each row block and split, in groups of GROUP row blocks (`common.place`).
`exp_logits_persistent_kernel` has one for each processor, which takes every so many-th of the same pieces of work. It
reads x and W through tensor descriptors: no thread computes an address, and a tile's loads need not wait for the end of
the one before. Products and sums have the same order in both. Descriptors want rows that begin at multiples of 16
bytes; where they do, the tile says which of the two runs.

Moves: x and W through L2 as any tiled product; writes 2NV bytes of slab if stored, 8N * splits of sums and maxima.

The stored exponential carries the derivative of the softcap, 1 - (z/softcap)^2, as the gradient products need it; the
sums do not. An anchor that is too low for a row (some z_iv - a_i beyond the headroom of the dtype) shows in the maxima:
`reanchor_kernel` raises it and marks the row block as dirty, and a second launch with REPAIR does the dirty blocks
again while every other program returns at once. No host has to look.
"""

import triton
import triton.language as tl

from .common import (
    pieces_of,
    place,
    place_step,
    project,
    project_descriptors,
    project_unaligned,
    steps_of_program,
    tanh,
)


@triton.jit
def _load_rows(row_block, target_ptr, anchor_ptr, N, begin, BLOCK_N: tl.constexpr):
    """(indices, which of them are below N, columns of the targets in the slice, anchors) of a row block."""
    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = (tl.load(target_ptr + rows, mask=inside, other=-1) - begin).to(tl.int32)
    return rows, inside, target, tl.load(anchor_ptr + rows, mask=inside, other=0.0)


@triton.jit
def _finish_tile(
    acc, sums, maxima, rows, row_inside, target, anchor, bias_ptr, slab_ptr,
    first_column, V, stride_slab, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STORE: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr,
    TAIL_REPEATS: tl.constexpr,  # columns of acc beyond V are copies of the last one
):  # fmt: skip
    """The exponentials of a tile of products, stored if asked for, and sums and maxima with those of the tile."""
    # columns of a piece, counted from its first: the same registers for every piece
    PIECE: tl.constexpr = BLOCK_V // PIECES
    columns = tl.arange(0, PIECE)
    pieces = pieces_of(acc, BLOCK_N, BLOCK_V, PIECES)
    for piece in tl.static_range(PIECES):
        first = first_column + piece * PIECE
        # a branch also keeps the compiler from mixing pieces, for which there are not enough registers
        if first < V:
            column_inside = columns < V - first
            z = pieces[piece]
            if HAS_BIAS:
                z += tl.load(bias_ptr + first + tl.minimum(columns, V - 1 - first)).to(tl.float32)[None, :]
            z *= logit_scale
            # before the softcap, which keeps the order
            if MAXIMA:
                real = z if TAIL_REPEATS else tl.where(column_inside[None, :], z, float("-inf"))
                maxima = tl.maximum(maxima, tl.max(real, axis=1))
            if HAS_SOFTCAP:
                capped = tanh(z / softcap)
                z = softcap * capped
            counted = column_inside[None, :] & (columns[None, :] != (target - first)[:, None])
            e = tl.where(counted, tl.exp(z - anchor[:, None]), 0.0)
            if SUMS:
                sums += tl.sum(e, axis=1)
            if STORE:
                if HAS_SOFTCAP:
                    e *= 1.0 - capped * capped
                slab = slab_ptr + rows[:, None] * stride_slab + first + columns[None, :]
                e = e.to(slab_ptr.dtype.element_ty)
                # apart, so that the last piece of the vocabulary alone is stored element by element
                if first + PIECE <= V:
                    tl.store(slab, e, mask=row_inside[:, None])
                else:
                    tl.store(slab, e, mask=row_inside[:, None] & column_inside[None, :])
    return sums, maxima


@triton.jit
def _store_statistics(
    sums, maxima, sum_ptr, max_ptr, split, rows, mask, N, softcap,
    HAS_SOFTCAP: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """The sums and maxima of a row block in a split."""
    at = split.to(tl.int64) * N + rows
    if SUMS:
        tl.store(sum_ptr + at, sums, mask=mask)
    if MAXIMA:
        if HAS_SOFTCAP:
            maxima = softcap * tanh(maxima / softcap)
        tl.store(max_ptr + at, maxima, mask=mask)


@triton.jit
def exp_logits_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H), the slice
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64, in the whole vocabulary
    anchor_ptr,  # (N,) float32
    dirty_ptr,  # (row blocks,) int32: REPAIR does only those set
    slab_ptr,  # (N, V) dtype of x, out
    sum_ptr,  # (splits, N) float32, out
    max_ptr,  # (splits, N) float32, out
    N,
    V,  # columns of the slice
    H,
    begin,  # first column of the slice in the vocabulary
    stride_x,
    stride_w,
    stride_slab,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    MAXIMA: tl.constexpr,
    REPAIR: tl.constexpr,
    EVEN_H: tl.constexpr,  # H is a multiple of BLOCK_H
    ALIGNED: tl.constexpr,  # rows of x and W begin at multiples of 16 bytes, or their strides pass 2^22
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bfloat16: give it float32
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
    PIECES: tl.constexpr = 1,  # of a tile, done one after the other in the epilogue
):
    """A program a row block and split."""
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    if REPAIR:
        if tl.load(dirty_ptr + row_block) == 0:
            return

    rows, row_inside, target, anchor = _load_rows(row_block, target_ptr, anchor_ptr, N, begin, BLOCK_N)
    x_rows = x_ptr + tl.minimum(rows, N - 1)[:, None] * stride_x
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    maxima = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        first_column = split_column + tile * BLOCK_V
        if ALIGNED:
            acc = project(
                x_rows, w_ptr, first_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION
            )
        else:
            acc = project_unaligned(
                x_ptr, w_ptr, row_block * BLOCK_N, first_column, N, V, H, stride_x, stride_w,
                BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION,
            )  # fmt: skip
        sums, maxima = _finish_tile(
            acc, sums, maxima, rows, row_inside, target, anchor, bias_ptr, slab_ptr,
            first_column, V, stride_slab, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, STORE, SUMS, MAXIMA, BLOCK_N, BLOCK_V, PIECES, TAIL_REPEATS=True,
        )  # fmt: skip
    _store_statistics(sums, maxima, sum_ptr, max_ptr, split, rows, row_inside, N, softcap, HAS_SOFTCAP, SUMS, MAXIMA)


@triton.jit
def exp_logits_persistent_kernel(
    x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    w_desc,  # (V, H), the slice, in blocks of (BLOCK_V, BLOCK_H)
    bias_ptr,  # this and what follows as in `exp_logits_kernel`
    target_ptr,
    anchor_ptr,
    dirty_ptr,
    slab_ptr,
    sum_ptr,
    max_ptr,
    N,
    V,
    H,
    begin,
    stride_slab,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    MAXIMA: tl.constexpr,
    REPAIR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,  # both loops as one, so that a tile's loads begin before the last one is finished
    SPECIALIZE: tl.constexpr,  # loads, products and epilogues by warps of their own; sm_100 and later
):
    """A program a processor; they take row blocks and splits in turns, and of a split one tile after the other."""
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    maxima = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    tl.assume(H > 0)  # without it no two loops become one
    steps = steps_of_program(row_blocks, splits, SPLIT_TILES)
    for step in tl.range(0, steps, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row_block, split, tile = place_step(step, row_blocks, splits, SPLIT_TILES, GROUP)
        first_column = (split * SPLIT_TILES + tile) * BLOCK_V
        depth, wanted = H, N
        if not FLATTEN:  # two loops become one only if the inner is always as long: beyond V it multiplies zeros
            depth = tl.where(first_column < V, H, 0)
        if REPAIR:
            dirty = tl.load(dirty_ptr + row_block) != 0
            depth, wanted = tl.where(dirty, depth, 0), tl.where(dirty, N, 0)

        acc = project_descriptors(
            x_desc, w_desc, row_block * BLOCK_N, first_column, depth,
            BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION,
        )  # fmt: skip
        rows, row_inside, target, anchor = _load_rows(row_block, target_ptr, anchor_ptr, wanted, begin, BLOCK_N)
        if SUMS:
            sums = tl.where(tile == 0, 0.0, sums)
        if MAXIMA:
            maxima = tl.where(tile == 0, float("-inf"), maxima)
        sums, maxima = _finish_tile(
            acc, sums, maxima, rows, row_inside, target, anchor, bias_ptr, slab_ptr,
            first_column, V, stride_slab, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, STORE, SUMS, MAXIMA, BLOCK_N, BLOCK_V, PIECES, TAIL_REPEATS=False,
        )  # fmt: skip
        # masked, not in a branch: Triton before 3.9 fails to merge loops that end in one
        done = rows < tl.where(tile == SPLIT_TILES - 1, wanted, 0)
        _store_statistics(sums, maxima, sum_ptr, max_ptr, split, rows, done, N, softcap, HAS_SOFTCAP, SUMS, MAXIMA)
