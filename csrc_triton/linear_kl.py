"""Two projections at once: what KL(reference || model) and its gradient need of a tile of both logits.

    d_iv = (z_iv - lse_i) - (z'_iv - lse'_i) = log p_iv - log q_iv
    KL_i = sum_v q_iv (exp(d_iv) - 1 - d_iv)          every term >= 0: nothing cancels where the models agree
    G_iv = q_iv (exp(d_iv) - 1) = p_iv - q_iv         the gradient, with the relative precision of d

for one slice of the vocabulary, z = cap(logit_scale (x W^T + b)) of the model and z' of the reference. It replaces

    logp, ref_logp = z.float().log_softmax(-1), ref_z.float().log_softmax(-1)
    kl, G = (ref_logp.exp() * (ref_logp - logp)).sum(-1), logp.exp() - ref_logp.exp()

and needs the normalizers of both softmaxes first (`softmax_sums_kernel`): summing q (log q - log p) in one pass would
leave 1e-7 of the logits' size, and KL is the square of d. They are the row maximum a and the total of exp(z - a), kept
apart:

    d = ((z - a) - (z' - a')) - shift,  q = exp(z' - a') ref_scale,  p = exp(z - a) scale
    shift = log total - log total',     scale = 1 / total,           ref_scale = 1 / total'

Nothing here is rounded at the size of the logits: z - a is exact, and shift is small where the models agree. Both
kernels take one tile, so that z has the same bits in both and the probabilities of a row sum to 1.

Tiles: as in `exp_logits_kernel`, narrower, because two accumulators live side by side. Grid: row blocks x splits,
grouped. Moves both rows and both heads through L2 as two tiled products; writes 2NV bytes of G if stored, 4N * splits
of sums. The stored G carries the derivative of the softcap, as in `exp_logits_kernel`.
"""

import triton
import triton.language as tl

from .common import place, project, tanh


@triton.jit
def _exp_terms(d, q, p):
    """(q expm1(d), q (expm1(d) - d)) for p = q exp(d): a series near 0, differences of the parts elsewhere."""
    tail = 1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320)))))
    curve = d * d * (0.5 + d * tail)
    near = tl.abs(d) < 0.5
    return tl.where(near, q * (d + curve), p - q), tl.where(near, q * curve, p - q - q * d)


@triton.jit
def _logits(
    x_rows, w_ptr, bias_ptr, first_column, V, H, stride_w, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) logits of one side; columns beyond V repeat the last one."""
    z = project(x_rows, w_ptr, first_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
    if HAS_BIAS:
        column = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1)
        z += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def softmax_sums_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    max_ptr,  # (splits, N) float32, out
    sum_ptr,  # (splits, N) float32: of exp(z - max), out
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
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The maximum of each row's logits in each split of the vocabulary, and the sum of the exponentials below it."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)

    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < N
    x_rows = x_ptr + tl.minimum(rows, N - 1)[:, None] * stride_x
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)

    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        first_column = split_column + tile * BLOCK_V
        z = _logits(
            x_rows, w_ptr, bias_ptr, first_column, V, H, stride_w, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION,
        )  # fmt: skip
        # columns beyond V repeat the last one: the maximum is right, and the sum leaves them out
        raised = tl.maximum(maximum, tl.max(z, axis=1))
        inside = (first_column + tl.arange(0, BLOCK_V) < V)[None, :]
        e = tl.where(inside, tl.exp(z - raised[:, None]), 0.0)
        total = total * tl.exp(maximum - raised) + tl.sum(e, axis=1)
        maximum = raised

    offset = split.to(tl.int64) * N + rows
    tl.store(max_ptr + offset, maximum, mask=row_inside)
    tl.store(sum_ptr + offset, total, mask=row_inside)


@triton.jit
def kl_logits_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H), the slice
    bias_ptr,  # (V,)
    ref_x_ptr,  # (N, H_REF)
    ref_w_ptr,  # (V, H_REF), the slice
    ref_bias_ptr,  # (V,)
    anchor_ptr,  # (N,) float32: a
    scale_ptr,  # (N,) float32
    ref_anchor_ptr,  # (N,) float32: a'
    ref_scale_ptr,  # (N,) float32
    shift_ptr,  # (N,) float32
    slab_ptr,  # (N, V) dtype of x: G, out
    sum_ptr,  # (splits, N) float32: KL, out
    N,
    V,  # columns of the slice
    H,
    H_REF,
    stride_x,
    stride_w,
    stride_ref_x,
    stride_ref_w,
    stride_slab,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE: tl.constexpr,
    EVEN_H: tl.constexpr,  # H and H_REF are multiples of BLOCK_H
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bfloat16: give it float32
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)

    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < N
    clamped_rows = tl.minimum(rows, N - 1)[:, None]
    x_rows, ref_x_rows = x_ptr + clamped_rows * stride_x, ref_x_ptr + clamped_rows * stride_ref_x
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)

    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        first_column = split_column + tile * BLOCK_V
        z = _logits(
            x_rows, w_ptr, bias_ptr, first_column, V, H, stride_w, logit_scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION,
        )  # fmt: skip
        ref_z = _logits(
            ref_x_rows, ref_w_ptr, ref_bias_ptr, first_column, V, H_REF, stride_ref_w, logit_scale, softcap,
            HAS_REF_BIAS, HAS_SOFTCAP, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION,
        )  # fmt: skip
        # read again for every tile: kept in registers during the products, they would make those spill
        below = z - tl.load(anchor_ptr + rows, mask=row_inside, other=0.0)[:, None]
        ref_below = ref_z - tl.load(ref_anchor_ptr + rows, mask=row_inside, other=0.0)[:, None]
        d = below - ref_below - tl.load(shift_ptr + rows, mask=row_inside, other=0.0)[:, None]
        p = tl.exp(below) * tl.load(scale_ptr + rows, mask=row_inside, other=0.0)[:, None]
        q = tl.exp(ref_below) * tl.load(ref_scale_ptr + rows, mask=row_inside, other=0.0)[:, None]
        g, kl = _exp_terms(d, q, p)
        column = first_column + tl.arange(0, BLOCK_V)
        inside = (column < V)[None, :]
        sums += tl.sum(tl.where(inside, kl, 0.0), axis=1)
        if STORE:
            if HAS_SOFTCAP:
                g *= 1.0 - (z / softcap) * (z / softcap)
            slab = slab_ptr + rows[:, None] * stride_slab + column[None, :]
            tl.store(slab, g.to(slab_ptr.dtype.element_ty), mask=row_inside[:, None] & inside)

    tl.store(sum_ptr + split.to(tl.int64) * N + rows, sums, mask=row_inside)
