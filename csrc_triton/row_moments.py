"""Moments of the logits of a row, and the gradient slab of any statistic computed from them.

For one split of the vocabulary, with z = cap(logit_scale (x W^T + b)) and m the maximum of the split; total, first and
second leave out the target column, logits includes it:

    total = sum_v exp(z_v - m)                        first = sum_v exp(z_v - m) (z_v - m)
    second = sum_v exp(z_v - m) (z_v - m)^2           logits = sum_v z_v

`row_moments_kernel` replaces, without storing z,

    m, argmax = z.max(1)
    e = torch.exp(z - m[:, None]).scatter(1, y[:, None], 0)
    total, first, second = (e * (z - m[:, None]) ** k).sum(1) for k = 0, 1, 2

and `moment_gradient_kernel` replaces, with the row vectors of `npo_kernels.core.row_moments.GradientRows`,

    e, c = exp(z - anchor), z - anchor - center
    slab = (e * (constant + linear * c + square * c**2) + flat) * slope, 0 at y and at argmax

Tiles, grids and splits are those of `exp_logits_kernel` and `exp_logits_persistent_kernel`; a tile of products is
processed in PIECES parts, one after the other. The moments of a piece are merged with the previous ones, both taken
about the larger of the two maxima. Memory traffic: x and W through L2, as in any tiled product; writes 28N * splits
bytes of moments, or 2NV bytes of slab (16-bit x).
"""

import triton
import triton.language as tl

from .common import pieces_of, place, place_step, project, project_descriptors, steps_of_program, tanh


@triton.jit
def _piece_of_logits(
    z, bias_ptr, first, columns, V, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """(logits, tanh(z / softcap) of the logits z before the softcap) of a piece of a tile of products."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + first + tl.minimum(columns, V - 1 - first)).to(tl.float32)[None, :]
    z *= logit_scale
    capped = z
    if HAS_SOFTCAP:
        capped = tanh(z / softcap)
        z = softcap * capped
    return z, capped


@triton.jit
def _join_tile(
    acc, maximum, argmax, total, sum1, sum2, logits, target, bias_ptr, first_column, V, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Merge the moments of a tile of products into the moments so far."""
    PIECE: tl.constexpr = BLOCK_V // PIECES
    columns = tl.arange(0, PIECE)
    pieces = pieces_of(acc, BLOCK_N, BLOCK_V, PIECES)
    for piece in tl.static_range(PIECES):
        first = first_column + piece * PIECE
        # the branch also keeps the compiler from interleaving pieces, which would need too many registers
        if first < V:
            z, _ = _piece_of_logits(
                pieces[piece], bias_ptr, first, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
            )
            real = (columns < V - first)[None, :]
            logits += tl.sum(tl.where(real, z, 0.0), axis=1)
            top, at = tl.max(tl.where(real, z, float("-inf")), axis=1, return_indices=True)
            argmax = tl.where(top > maximum, first + at, argmax)
            raised = tl.maximum(maximum, top)
            center = tl.where(raised == float("-inf"), 0.0, raised)  # 0 while all logits so far are -inf
            shift = tl.where(maximum == float("-inf"), 0.0, maximum - center)
            factor = tl.exp(shift)
            sum2 = factor * (sum2 + shift * (2.0 * sum1 + shift * total))
            sum1 = factor * (sum1 + shift * total)
            total = factor * total
            below = z - center[:, None]
            counted = real & (columns[None, :] != (target - first)[:, None])
            e = tl.where(counted, tl.exp(below), 0.0)
            below = tl.where(e == 0.0, 0.0, below)  # avoids 0 * inf
            total += tl.sum(e, axis=1)
            e *= below
            sum1 += tl.sum(e, axis=1)
            sum2 += tl.sum(e * below, axis=1)
            maximum = raised
    return maximum, argmax, total, sum1, sum2, logits


@triton.jit
def _no_moments(BLOCK_N: tl.constexpr):
    """Initial (maximum, argmax, total, first, second, logits): the moments of no columns."""
    zero = tl.zeros((BLOCK_N,), dtype=tl.float32)
    return tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.int32), zero, zero, zero, zero


@triton.jit
def _store_moments(
    maximum, argmax, total, sum1, sum2, logits, max_ptr, argmax_ptr, total_ptr, first_ptr, second_ptr, logits_ptr,
    split, rows, mask, N,
):  # fmt: skip
    """Store the moments of a row block in a split."""
    at = split.to(tl.int64) * N + rows
    tl.store(max_ptr + at, maximum, mask=mask)
    tl.store(argmax_ptr + at, argmax.to(tl.int64), mask=mask)
    tl.store(total_ptr + at, total, mask=mask)
    tl.store(first_ptr + at, sum1, mask=mask)
    tl.store(second_ptr + at, sum2, mask=mask)
    tl.store(logits_ptr + at, logits, mask=mask)


@triton.jit
def row_moments_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    max_ptr,  # (splits, N) float32, out, as are all the following but argmax
    argmax_ptr,  # (splits, N) int64, out
    total_ptr,
    first_ptr,
    second_ptr,
    logits_ptr,
    N,
    V,
    H,
    stride_x,
    stride_w,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_H: tl.constexpr,  # H is a multiple of BLOCK_H
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32: the interpreter would multiply the raw bits of bfloat16
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
    PIECES: tl.constexpr,
):
    """One program per row block and split."""
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)  # int32: halves the registers for addresses of row vectors
    inside = rows < N
    x_rows = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_x
    target = tl.load(target_ptr + rows, mask=inside, other=-1).to(tl.int32)
    maximum, argmax, total, sum1, sum2, logits = _no_moments(BLOCK_N)
    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        column = split_column + tile * BLOCK_V
        acc = project(x_rows, w_ptr, column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
        maximum, argmax, total, sum1, sum2, logits = _join_tile(
            acc, maximum, argmax, total, sum1, sum2, logits, target, bias_ptr, column, V, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, PIECES,
        )  # fmt: skip
    _store_moments(
        maximum, argmax, total, sum1, sum2, logits,
        max_ptr, argmax_ptr, total_ptr, first_ptr, second_ptr, logits_ptr, split, rows, inside, N,
    )  # fmt: skip


@triton.jit
def row_moments_persistent_kernel(
    x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    w_desc,  # (V, H) in blocks of (BLOCK_V, BLOCK_H)
    bias_ptr,  # this and the following as in `row_moments_kernel`
    target_ptr,
    max_ptr,
    argmax_ptr,
    total_ptr,
    first_ptr,
    second_ptr,
    logits_ptr,
    N,
    V,
    H,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,  # merge both loops, so that a tile's loads start before the previous tile is finished
):
    """`row_moments_kernel` with one program per multiprocessor: the same sums in the same order.

    It runs only where MOMENT_LOOPS has an entry, which takes a measurement.
    """
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    maximum, argmax, total, sum1, sum2, logits = _no_moments(BLOCK_N)
    tl.assume(H > 0)  # the compiler merges the two loops only if the inner one cannot be empty
    for step in tl.range(0, steps_of_program(row_blocks, splits, SPLIT_TILES), flatten=FLATTEN):
        row_block, split, tile = place_step(step, row_blocks, splits, SPLIT_TILES, GROUP)
        column = (split * SPLIT_TILES + tile) * BLOCK_V
        depth = H
        if not FLATTEN:  # merging needs an inner loop of constant length: with FLATTEN, tiles beyond V multiply zeros
            depth = tl.where(column < V, H, 0)
        acc = project_descriptors(
            x_desc, w_desc, row_block * BLOCK_N, column, depth, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION
        )
        rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
        target = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
        begins = tile == 0
        maximum, argmax = tl.where(begins, float("-inf"), maximum), tl.where(begins, 0, argmax)
        total, logits = tl.where(begins, 0.0, total), tl.where(begins, 0.0, logits)
        sum1, sum2 = tl.where(begins, 0.0, sum1), tl.where(begins, 0.0, sum2)
        maximum, argmax, total, sum1, sum2, logits = _join_tile(
            acc, maximum, argmax, total, sum1, sum2, logits, target, bias_ptr, column, V, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, BLOCK_N, BLOCK_V, PIECES,
        )  # fmt: skip
        # a mask instead of a branch: Triton before 3.9 fails to merge loops that end in a branch
        done = rows < tl.where(tile == SPLIT_TILES - 1, N, 0)
        _store_moments(
            maximum, argmax, total, sum1, sum2, logits,
            max_ptr, argmax_ptr, total_ptr, first_ptr, second_ptr, logits_ptr, split, rows, done, N,
        )  # fmt: skip


@triton.jit
def moment_gradient_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H), the slice
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64, column in the whole vocabulary
    anchor_ptr,  # (N,) float32, as are all up to flat_ptr
    center_ptr,
    constant_ptr,
    linear_ptr,
    square_ptr,
    flat_ptr,
    argmax_ptr,  # (N,) int64, column in the whole vocabulary
    slab_ptr,  # (N, V) dtype of x, out
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
    EVEN_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One program per row block and split."""
    PIECE: tl.constexpr = BLOCK_V // PIECES
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)  # int32: halves the registers for addresses of row vectors
    inside = rows < N
    x_rows = x_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_x
    columns = tl.arange(0, PIECE)
    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        tile_column = split_column + tile * BLOCK_V
        acc = project(x_rows, w_ptr, tile_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
        pieces = pieces_of(acc, BLOCK_N, BLOCK_V, PIECES)
        for piece in tl.static_range(PIECES):
            first = tile_column + piece * PIECE
            if first < V:
                z, capped = _piece_of_logits(
                    pieces[piece], bias_ptr, first, columns, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
                )
                # loaded again for every piece: keeping them in registers during the products would cause spills
                below = z - tl.load(anchor_ptr + rows, mask=inside, other=0.0)[:, None]
                e = tl.exp(below)
                c = below - tl.load(center_ptr + rows, mask=inside, other=0.0)[:, None]
                c = tl.where(e == 0.0, 0.0, c)  # avoids 0 * inf
                curve = tl.load(square_ptr + rows, mask=inside, other=0.0)[:, None] * c
                curve = (curve + tl.load(linear_ptr + rows, mask=inside, other=0.0)[:, None]) * c
                curve += tl.load(constant_ptr + rows, mask=inside, other=0.0)[:, None]
                g = e * curve + tl.load(flat_ptr + rows, mask=inside, other=0.0)[:, None]
                target = (tl.load(target_ptr + rows, mask=inside, other=-1) - begin - first).to(tl.int32)
                argmax = (tl.load(argmax_ptr + rows, mask=inside, other=-1) - begin - first).to(tl.int32)
                left_out = (columns[None, :] == target[:, None]) | (columns[None, :] == argmax[:, None])
                g = tl.where(left_out, 0.0, g)
                if HAS_SOFTCAP:
                    g *= 1.0 - capped * capped
                slab = slab_ptr + rows.to(tl.int64)[:, None] * stride_slab + first + columns[None, :]
                stored = inside[:, None] & (columns < V - first)[None, :]
                tl.store(slab, g.to(slab_ptr.dtype.element_ty), mask=stored)
