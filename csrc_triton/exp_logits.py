"""The streaming projection: a product with the head whose epilogue is the anchored exponential.

    E_iv = exp(z_iv - a_i),  E_{i,y_i} = 0,  z_iv = cap(logit_scale * (x_i . W_v + b_v))

Replaces, for one slice of the vocabulary and without z,

    z = cap(logit_scale * (x @ W.T + b).float())
    E = torch.exp(z - anchor[:, None]).scatter(1, y[:, None], 0)
    sums, maxima = E.sum(1), z.amax(1)

Tiles: a program owns BLOCK_N rows and one split of SPLIT_TILES consecutive BLOCK_V-wide tiles; the float32 accumulator
of a tile goes through the exponential in registers, in PIECES one after the other, so that what is between finds room
beside it. Nothing but the stored slab (STORE, in the dtype of x) and two floats per row and split (SUMS, MAXIMA) is
written. Splits start at multiples of SPLIT_TILES * BLOCK_V columns, whatever N is, and are reduced in order afterwards:
the log-probability of a row does not depend on its batch.

Grid: row blocks x splits, in groups of GROUP row blocks (`common.place`).

Moves: x and W through L2 as any tiled product; writes 2NV bytes of slab if stored, 8N * splits of sums and maxima.

The stored exponential carries the derivative of the softcap, 1 - (z/softcap)^2, as the gradient products need it; the
sums do not. An anchor that is too low for a row (some z_iv - a_i beyond the headroom of the dtype) shows in the maxima:
`reanchor` raises it and marks the row block as dirty, and a second launch with REPAIR does the dirty blocks again while
every other program returns at once. No host has to look.
"""

import triton
import triton.language as tl

from .common import place, project, tanh


@triton.jit
def _pieces(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The columns of t in PIECES equal parts, a power of two, from left to right: registers renamed, nothing moved."""
    if PIECES == 1:
        return (t,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(t, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        left = _pieces(left, ROWS, COLUMNS // 2, PIECES // 2)
        return left + _pieces(right, ROWS, COLUMNS // 2, PIECES // 2)


@triton.jit
def exp_logits(
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
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bfloat16: give it float32
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
    PIECES: tl.constexpr = 1,  # of a tile, done one after the other in the epilogue
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    if REPAIR:
        if tl.load(dirty_ptr + row_block) == 0:
            return

    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < N
    x_rows = x_ptr + tl.minimum(rows, N - 1)[:, None] * stride_x
    target = (tl.load(target_ptr + rows, mask=row_inside, other=-1) - begin).to(tl.int32)
    anchor = tl.load(anchor_ptr + rows, mask=row_inside, other=0.0)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    maxima = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    # columns of a piece, counted from its first: the same registers for every piece
    PIECE: tl.constexpr = BLOCK_V // PIECES
    columns = tl.arange(0, PIECE)

    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        first_column = split_column + tile * BLOCK_V
        acc = project(x_rows, w_ptr, first_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
        pieces = _pieces(acc, BLOCK_N, BLOCK_V, PIECES)
        for piece in tl.static_range(PIECES):
            first = first_column + piece * PIECE
            # a branch also keeps the compiler from mixing pieces, for which there are not enough registers
            if first < V:
                column_inside = columns < V - first
                z = pieces[piece]
                if HAS_BIAS:
                    z += tl.load(bias_ptr + first + tl.minimum(columns, V - 1 - first)).to(tl.float32)[None, :]
                z *= logit_scale
                # before the softcap, which keeps the order; the clamped tail of the vocabulary repeats its last column
                if MAXIMA:
                    maxima = tl.maximum(maxima, tl.max(z, axis=1))
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

    if SUMS:
        tl.store(sum_ptr + split.to(tl.int64) * N + rows, sums, mask=row_inside)
    if MAXIMA:
        if HAS_SOFTCAP:
            maxima = softcap * tanh(maxima / softcap)
        tl.store(max_ptr + split.to(tl.int64) * N + rows, maxima, mask=row_inside)
