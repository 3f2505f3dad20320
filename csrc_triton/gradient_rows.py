"""The O(NH) terms of the gradients, before and after the two matrix products with the slab of exponentials E.

    dHidden_i = target_coef_i W[y_i] - row_coef_i (E W)_i         after the product: scale it and add the target
    dWeight   = E^T (-row_coef * X) + scatter(target_coef_i x_i)  before: scale X; after: add the targets

The target column is left out of E and added here in float32: as p_y -> 1 it dominates the gradient of its row.

A gradient that was formed in the forward is multiplied by its upstream gradient in the backward, in one pass.
"""

import triton
import triton.language as tl


@triton.jit
def scale_rows_kernel(
    x_ptr,  # (N, H)
    scale_ptr,  # (N,) float32
    out_ptr,  # (N, H) dtype of x, contiguous, out
    H,
    stride_x,
    sign,  # 1.0 or -1.0
    BLOCK_H: tl.constexpr,
):
    """out_i = sign * scale_i * x_i, rounded once; exactly 0 where scale_i is 0.

    Grid: rows x blocks of H. Moves 2NH elements.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    scale = sign * tl.load(scale_ptr + row)
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(scale == 0.0, 0.0, scale * x)
    tl.store(out_ptr + row * H + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_hidden_grad_kernel(
    product_ptr,  # (N, H) float32, contiguous: E @ W
    row_coef_ptr,  # (N,) float32
    target_coef_ptr,  # (N,) float32
    target_ptr,  # (N,) int64; -1: padding row; other negative values: the label has no column in this head
    index_ptr,  # (N,) int64: row of `out`
    w_ptr,  # (V, H)
    out_ptr,  # (T, H) dtype of the hidden states, contiguous, out
    V,
    H,
    stride_w,
    BLOCK_H: tl.constexpr,
):
    """out[index_i] = target_coef_i W[target_i] - row_coef_i product_i, rounded once; padding rows write nothing.

    Grid: rows x blocks of H. Moves 4NH bytes and 2NH elements.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    target = tl.load(target_ptr + row)
    inside = (columns < H) & (target != -1)
    label = tl.minimum(tl.maximum(target, 0), V - 1)
    product = tl.load(product_ptr + row * H + columns, mask=inside, other=0.0)
    w = tl.load(w_ptr + label * stride_w + columns, mask=inside, other=0.0).to(tl.float32)
    target_coef = tl.where(target >= 0, tl.load(target_coef_ptr + row), 0.0)
    grad = target_coef * w - tl.load(row_coef_ptr + row) * product
    out = out_ptr + tl.load(index_ptr + row) * H + columns
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_targets_kernel(
    grad_ptr,  # (V, H) float32, the slice, added to in place
    x_ptr,  # (N, H)
    coef_ptr,  # (N,) float32
    sorted_ptr,  # (N,) int64: the targets in ascending order
    order_ptr,  # (N,) int64: the rows in that order (stable sort)
    N,
    V,  # columns of the slice
    H,
    begin,  # first column of the slice in the vocabulary
    stride_x,
    stride_grad,
    BLOCK_RUN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grad[y - begin] += sum of coef_i x_i over the rows with target y.

    One program sums each y, in row order and without atomics, so the result is deterministic. Grid: sorted rows x
    blocks of H; a program returns at once unless its row is the first of a run of equal targets. Moves NH elements and
    8H bytes per distinct target.
    """
    first = tl.program_id(0).to(tl.int64)
    target = tl.load(sorted_ptr + first)
    if (target < begin) | (target >= begin + V):
        return
    if first > 0:
        if tl.load(sorted_ptr + first - 1) == target:
            return
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    at = first
    more = 1
    while more != 0:
        positions = at + tl.arange(0, BLOCK_RUN)
        mine = (positions < N) & (tl.load(sorted_ptr + positions, mask=positions < N, other=-1) == target)
        rows = tl.load(order_ptr + positions, mask=mine, other=0)
        coef = tl.load(coef_ptr + rows, mask=mine, other=0.0)
        x = tl.load(
            x_ptr + rows[:, None] * stride_x + columns[None, :],
            mask=mine[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(coef[:, None] * x.to(tl.float32), axis=0)
        more = tl.min(mine.to(tl.int32), axis=0)
        at += BLOCK_RUN
    grad = grad_ptr + (target - begin) * stride_grad + columns
    tl.store(grad, tl.load(grad, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def scale_gradient_kernel(
    formed_ptr,  # (rows, H), contiguous: the gradient from the forward
    unit_ptr,  # (rows,) float32: scale of each row (float16 only)
    upstream_ptr,  # () of any floating dtype
    out_ptr,  # (rows, H), contiguous, out
    size,  # rows * H, may exceed 2^31
    H,
    HAS_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out_ij = formed_ij * (upstream * unit_i) in float32, rounded once to the dtype of out.

    Grid: blocks of BLOCK elements of the flattened gradient. Reads and writes each element once.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    factor = tl.load(upstream_ptr).to(tl.float32)
    grad = tl.load(formed_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_UNIT:
        grad *= factor * tl.load(unit_ptr + at // H, mask=inside, other=0.0)
    else:
        grad *= factor
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=inside)
