"""Product with the lm-head whose epilogue is the anchored exponential of the logits.

    E_iv = exp(z_iv - a_i),  E_{i,y_i} = 0,  z_iv = cap(logit_scale * (x_i . W_v + b_v))

where a_i is the anchor of row i (its target logit, unless raised) and cap(z) = softcap * tanh(z / softcap).

Replaces, for one slice of the vocabulary and without storing z,

    z = cap(logit_scale * (x @ W.T + b).float())
    E = torch.exp(z - anchor[:, None]).scatter(1, y[:, None], 0)
    sums, maxima = E.sum(1), z.amax(1)

Tiles: one piece of work is BLOCK_N rows x one split, which is SPLIT_TILES consecutive tiles of BLOCK_V columns. The
float32 accumulator of a tile is exponentiated in registers, in PIECES parts one after the other, so that the
temporaries fit beside it. Only the slab (STORE, in the dtype of x) and two floats per row and split (SUMS, MAXIMA) are
written. Splits start at multiples of SPLIT_TILES * BLOCK_V columns for any N and are reduced in order afterwards, so
the log-probability of a row does not depend on the rest of its batch.

Grid: `exp_logits_kernel` runs one program per row block and split, in groups of GROUP row blocks (`common.place`).
`exp_logits_persistent_kernel` runs one program per multiprocessor; program i takes every num_programs-th piece of work.
It reads x and W through tensor descriptors: no thread computes addresses, and the loads of a tile can start before the
previous tile is finished. Products and sums have the same order in both kernels. Descriptors need rows that start at
multiples of 16 bytes; if they do, the `loop` field of the tile selects the kernel.

Memory traffic: x and W through L2, as in any tiled product; writes 2NV bytes of slab if stored (16-bit x), and
8N * splits bytes of sums and maxima.

The stored exponentials include the derivative of the softcap, 1 - (z/softcap)^2, which the gradient products need; the
sums do not. If the anchor of a row is too low (some z_iv - a_i exceeds the headroom of the dtype), the maxima show it:
`reanchor_kernel` raises the anchor and marks the row block as dirty, and a second launch with REPAIR recomputes the
dirty blocks, while all other programs return at once. This needs no host sync.
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
    """(row indices, mask of indices below N, target columns relative to the slice, anchors) of a row block."""
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
    """Exponentiate a tile of products, store it if STORE, and return the sums and maxima updated with the tile."""
    # column offsets within a piece: the same registers serve every piece
    PIECE: tl.constexpr = BLOCK_V // PIECES
    columns = tl.arange(0, PIECE)
    pieces = pieces_of(acc, BLOCK_N, BLOCK_V, PIECES)
    for piece in tl.static_range(PIECES):
        first = first_column + piece * PIECE
        # the branch also keeps the compiler from interleaving pieces, which would need too many registers
        if first < V:
            column_inside = columns < V - first
            z = pieces[piece]
            if HAS_BIAS:
                z += tl.load(bias_ptr + first + tl.minimum(columns, V - 1 - first)).to(tl.float32)[None, :]
            z *= logit_scale
            # before the softcap, which is monotonic
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
                # two branches, so that only the last piece of the vocabulary is stored element by element
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
    """Store the sums and maxima of a row block in a split."""
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
    target_ptr,  # (N,) int64, column in the whole vocabulary
    anchor_ptr,  # (N,) float32
    dirty_ptr,  # (row blocks,) int32: with REPAIR, only nonzero blocks are computed
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
    ALIGNED: tl.constexpr,  # see `npo_kernels.backends.triton.launch.aligned`
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32: the interpreter would multiply the raw bits of bfloat16
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
    PIECES: tl.constexpr = 1,  # parts of a tile that the epilogue processes one after the other
):
    """One program per row block and split."""
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
    bias_ptr,  # this and the following as in `exp_logits_kernel`
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
    FLATTEN: tl.constexpr,  # merge both loops, so that a tile's loads start before the previous tile is finished
    SPECIALIZE: tl.constexpr,  # separate warps for loads, products and epilogues; sm_100 and later
):
    """One program per multiprocessor; pieces of work are dealt out round robin, their tiles done in order."""
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    maxima = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    tl.assume(H > 0)  # the compiler merges the two loops only if the inner one cannot be empty
    steps = steps_of_program(row_blocks, splits, SPLIT_TILES)
    for step in tl.range(0, steps, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row_block, split, tile = place_step(step, row_blocks, splits, SPLIT_TILES, GROUP)
        first_column = (split * SPLIT_TILES + tile) * BLOCK_V
        depth, wanted = H, N
        if not FLATTEN:  # merging needs an inner loop of constant length: with FLATTEN, tiles beyond V multiply zeros
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
        # a mask instead of a branch: Triton before 3.9 fails to merge loops that end in a branch
        done = rows < tl.where(tile == SPLIT_TILES - 1, wanted, 0)
        _store_statistics(sums, maxima, sum_ptr, max_ptr, split, rows, done, N, softcap, HAS_SOFTCAP, SUMS, MAXIMA)
