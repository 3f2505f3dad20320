"""Target logit of each row: a gathered dot product.

    z_i = cap(logit_scale * (x_i . W[y_i] + b[y_i])),    cap(z) = softcap * tanh(z / softcap)

It anchors the exponentials and is the only logit that is kept in memory. Replaces (without bias, scale and softcap)

    z = (x.float() * W[y].float()).sum(1)

Grid: one program per row. Reads 2NH elements, writes 4N bytes. Sums in float32.
A row with target V (poisoned: invalid label) gives NaN, which propagates to all results of that row. A row with
target < 0 (padding, or a label on another rank) gives a value that is not used.
"""

import triton
import triton.language as tl

from .common import tanh


@triton.jit
def target_logit_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    z_ptr,  # (N,) float32, out
    V,
    H,
    stride_x,
    stride_w,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    label = tl.minimum(tl.maximum(target, 0), V - 1)
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        columns = h + tl.arange(0, BLOCK_H)
        inside = columns < H
        x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + label * stride_w + columns, mask=inside, other=0.0).to(tl.float32)
        acc += x * w
    z = tl.sum(acc, axis=0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label).to(tl.float32)
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    z = tl.where(target == V, float("nan"), z)
    tl.store(z_ptr + row, z)
