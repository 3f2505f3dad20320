"""z_y of each row: a gathered dot product.

    z_i = cap(logit_scale * (x_i . W[y_i] + b[y_i])),    cap(z) = softcap * tanh(z / softcap)

The anchor of the exponentials and the only logit that has to exist in memory. It replaces

    z = (x.float() * W[y].float()).sum(1)

Grid: one program per row. Moves 2NH elements in and 4N bytes out. Sums in float32.
A row whose target is V (poisoned) gives NaN, which then reaches everything computed from it; a row without a target
here (target < 0) gives a finite value that nothing uses.
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
