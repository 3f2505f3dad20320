"""KL divergence of a model and a reference, and its gradient, from a tile of both logits at a time.

    d_iv = (z_iv - lse_i) - (z'_iv - lse'_i) = log p_iv - log q_iv

    KL(q || p)_i = sum_v q_iv (exp(d_iv) - 1 - d_iv)       G_iv = q_iv (exp(d_iv) - 1) = p_iv - q_iv
    KL(p || q)_i = sum_v p_iv (exp(-d_iv) - 1 + d_iv)      G_iv = p_iv (d_iv - KL_i)                    (REVERSE)

for one slice of the vocabulary, where z = cap(logit_scale (x W^T + b)) are the model's logits and z' the reference's,
lowered by target_shift at the target of each row (HAS_TARGET). Every term is >= 0, so nothing cancels where the models
agree. G has the relative precision of d; the REVERSE G has an error of 1e-7 of p and of KL. Replaces

    logp, ref_logp = z.float().log_softmax(-1), (ref_z - target_shift * one_hot(target)).float().log_softmax(-1)
    kl, G = (ref_logp.exp() * (ref_logp - logp)).sum(-1), logp.exp() - ref_logp.exp()
    kl = (logp.exp() * (logp - ref_logp)).sum(-1); G = logp.exp() * (logp - ref_logp - kl[:, None])      # REVERSE

The normalizers of both softmaxes are computed first (`softmax_sums_kernel`). Summing q (log q - log p) in a single pass
would leave an error of 1e-7 of the size of the logits, which is too much because KL is quadratic in d. The REVERSE G
also needs KL, which a launch without STORE computes first. The normalizers are the row maximum a and the sum (total) of
exp(z - a), kept separate:

    d = ((z - a) - (z' - a')) - shift,  q = exp(z' - a') ref_scale,  p = exp(z - a) scale
    shift = log total - log total',     scale = 1 / total,           ref_scale = 1 / total'

No rounding error here scales with the logits: z - a is exact, and shift is small where the models agree. At the target,
(z' - a') - target_shift takes the place of z' - a', where a' is the maximum of the shifted logits. Rounding of a' does
no harm, since any number near the maximum can serve as the anchor, and total' does not underflow if only the target was
near it. Both kernels use the same tile, so that z is bitwise equal in both and the probabilities of a row sum to 1.

Tiles: as in `exp_logits_kernel`, but narrower, because there are two accumulators. Grid: row blocks x splits, grouped.
The persistent kernels run one program per multiprocessor and read through tensor descriptors, like
`exp_logits_persistent_kernel`; their results are bitwise the same. Memory traffic: both x and both heads through L2, as
two tiled products; writes 8N * splits bytes of maxima and sums (`softmax_sums`), or 4N * splits bytes of KL and, if
stored, 2NV bytes of G (16-bit x). The stored G includes the derivative of the softcap.
"""

import triton
import triton.language as tl

from .common import place, place_step, project, project_descriptors, steps_of_program, tanh


@triton.jit
def _exp_terms(d, q, p):
    """(q expm1(d), q (expm1(d) - d)) given p = q exp(d): a series for |d| < 1/2, differences of p and q elsewhere."""
    tail = 1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320)))))
    curve = d * d * (0.5 + d * tail)
    near = tl.abs(d) < 0.5
    return tl.where(near, q * (d + curve), p - q), tl.where(near, q * curve, p - q - q * d)


@triton.jit
def _capped(
    z, bias_ptr, first_column, V, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Logits from a tile of products: bias, scale and softcap applied."""
    if HAS_BIAS:
        column = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1)
        z += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    z *= logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def _lowering(rows, row_inside, target_ptr, target_shift, first_column, BLOCK_V: tl.constexpr):
    """(BLOCK_N, BLOCK_V): target_shift at the target of each row, 0 elsewhere.

    `first_column` is the vocabulary column of the first column of the tile.
    """
    # relative to the first column of the tile, so that 32 bits suffice
    target = (tl.load(target_ptr + rows, mask=row_inside, other=-1) - first_column).to(tl.int32)
    return tl.where(tl.arange(0, BLOCK_V)[None, :] == target[:, None], target_shift, 0.0)


@triton.jit
def _take_sums(
    z, maximum, total, rows, row_inside, target_ptr, target_shift, first_column, V,
    HAS_TARGET: tl.constexpr, BLOCK_V: tl.constexpr,
    TAIL_REPEATS: tl.constexpr,  # columns of z beyond V are copies of the last one
):  # fmt: skip
    """(maximum, total) updated with a tile of logits."""
    inside = (first_column + tl.arange(0, BLOCK_V) < V)[None, :]
    lowered = z
    if HAS_TARGET:
        lowering = _lowering(rows, row_inside, target_ptr, target_shift, first_column, BLOCK_V)
        lowered = z - lowering
    if HAS_TARGET or not TAIL_REPEATS:  # copies of a lowered last column would not be lowered
        lowered = tl.where(inside, lowered, float("-inf"))
    raised = tl.maximum(maximum, tl.max(lowered, axis=1))
    below = z - raised[:, None]
    if HAS_TARGET:
        below -= lowering
    e = tl.where(inside, tl.exp(below), 0.0)
    return raised, total * tl.exp(maximum - raised) + tl.sum(e, axis=1)


@triton.jit
def _rows(row_block, slab_ptr, BLOCK_N: tl.constexpr, CROWDED: tl.constexpr):
    """Row indices of a block: int32 if a 16-bit slab is stored with softcap and target, which is short of registers."""
    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if CROWDED:
        if slab_ptr.dtype.element_ty.primitive_bitwidth == 16:
            return rows.to(tl.int32)
        else:
            return rows
    else:
        return rows


@triton.jit
def _take_kl(
    z, ref_z, sums, rows, row_inside, anchor_ptr, scale_ptr, ref_anchor_ptr, ref_scale_ptr, shift_ptr, target_ptr,
    kl_ptr, slab_ptr, first_column, V, begin, stride_slab, softcap, target_shift,
    HAS_SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr, REVERSE: tl.constexpr, STORE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add the KL terms of a tile of both logits to the sums; store its gradient if STORE."""
    row = rows
    if HAS_TARGET:
        row = rows.to(tl.int32)  # with int64 indices the tiles of 32-bit operands spill
    # loaded again for every tile: keeping them in registers during the products would cause spills
    below = z - tl.load(anchor_ptr + row, mask=row_inside, other=0.0)[:, None]
    ref_below = ref_z - tl.load(ref_anchor_ptr + row, mask=row_inside, other=0.0)[:, None]
    if HAS_TARGET:
        ref_below -= _lowering(row, row_inside, target_ptr, target_shift, begin + first_column, BLOCK_V)
    d = below - ref_below - tl.load(shift_ptr + row, mask=row_inside, other=0.0)[:, None]
    p = tl.exp(below) * tl.load(scale_ptr + row, mask=row_inside, other=0.0)[:, None]
    q = tl.exp(ref_below) * tl.load(ref_scale_ptr + row, mask=row_inside, other=0.0)[:, None]
    if REVERSE:
        _, kl = _exp_terms(-d, p, q)
        if STORE:
            g = p * (d - tl.load(kl_ptr + row, mask=row_inside, other=0.0)[:, None])
    else:
        g, kl = _exp_terms(d, q, p)
    column = first_column + tl.arange(0, BLOCK_V)
    inside = (column < V)[None, :]
    sums += tl.sum(tl.where(inside, kl, 0.0), axis=1)
    if STORE:
        if HAS_SOFTCAP:
            g *= 1.0 - (z / softcap) * (z / softcap)
        slab = slab_ptr + rows.to(tl.int64)[:, None] * stride_slab + column[None, :]
        tl.store(slab, g.to(slab_ptr.dtype.element_ty), mask=row_inside[:, None] & inside)
    return sums


@triton.jit
def softmax_sums_kernel(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    max_ptr,  # (splits, N) float32, out
    sum_ptr,  # (splits, N) float32, out: sum of exp(z - max)
    N,
    V,
    H,
    stride_x,
    stride_w,
    logit_scale,
    softcap,
    target_shift,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,  # the logit at the target is lowered by target_shift
    EVEN_H: tl.constexpr,  # H is a multiple of BLOCK_H
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maximum of the logits of each row in each split of the vocabulary, and the sum of exp(z - maximum)."""
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
        acc = project(x_rows, w_ptr, first_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
        z = _capped(acc, bias_ptr, first_column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        maximum, total = _take_sums(
            z, maximum, total, rows, row_inside, target_ptr, target_shift, first_column, V, HAS_TARGET, BLOCK_V, True
        )

    offset = split.to(tl.int64) * N + rows
    tl.store(max_ptr + offset, maximum, mask=row_inside)
    tl.store(sum_ptr + offset, total, mask=row_inside)


@triton.jit
def softmax_sums_persistent_kernel(
    x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    w_desc,  # (V, H) in blocks of (BLOCK_V, BLOCK_H)
    bias_ptr, target_ptr, max_ptr, sum_ptr, N, V, H, logit_scale, softcap, target_shift,  # as in the kernel above
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,  # merge both loops, so that a tile's loads start before the previous tile is finished
):  # fmt: skip
    """One program per multiprocessor; pieces of work are dealt out round robin, their tiles done in order.

    A tile in PAIR_TILES selects this kernel only after a measurement (PAIR_MEASURED).
    """
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    maximum = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    tl.assume(H > 0)  # the compiler merges the two loops only if the inner one cannot be empty
    for step in tl.range(0, steps_of_program(row_blocks, splits, SPLIT_TILES), flatten=FLATTEN):
        row_block, split, tile = place_step(step, row_blocks, splits, SPLIT_TILES, GROUP)
        first_column = (split * SPLIT_TILES + tile) * BLOCK_V
        depth = H
        if not FLATTEN:  # merging needs an inner loop of constant length: with FLATTEN, tiles beyond V multiply zeros
            depth = tl.where(first_column < V, H, 0)
        acc = project_descriptors(
            x_desc, w_desc, row_block * BLOCK_N, first_column, depth, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION
        )
        z = _capped(acc, bias_ptr, first_column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        maximum, total = tl.where(tile == 0, float("-inf"), maximum), tl.where(tile == 0, 0.0, total)
        maximum, total = _take_sums(
            z, maximum, total, rows, rows < N, target_ptr, target_shift, first_column, V, HAS_TARGET, BLOCK_V, False
        )
        # a mask instead of a branch: Triton before 3.9 fails to merge loops that end in a branch
        done = rows < tl.where(tile == SPLIT_TILES - 1, N, 0)
        offset = split.to(tl.int64) * N + rows
        tl.store(max_ptr + offset, maximum, mask=done)
        tl.store(sum_ptr + offset, total, mask=done)


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
    target_ptr,  # (N,) int64, column in the whole vocabulary
    kl_ptr,  # (N,) float32: KL of each row, for the REVERSE G
    slab_ptr,  # (N, V) dtype of x, out: G
    sum_ptr,  # (splits, N) float32, out: KL
    N,
    V,  # columns of the slice
    H,
    H_REF,
    begin,  # first column of the slice in the vocabulary
    stride_x,
    stride_w,
    stride_ref_x,
    stride_ref_w,
    stride_slab,
    logit_scale,
    softcap,
    target_shift,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGET: tl.constexpr,  # the reference's logit at the target is lowered by target_shift
    REVERSE: tl.constexpr,  # KL(model || reference)
    STORE: tl.constexpr,
    EVEN_H: tl.constexpr,  # H and H_REF are multiples of BLOCK_H
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # to float32: the interpreter would multiply the raw bits of bfloat16
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    splits = tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    row_block, split = place(tl.program_id(0), row_blocks, splits, GROUP)

    rows = _rows(row_block, slab_ptr, BLOCK_N, STORE and HAS_SOFTCAP and HAS_TARGET)
    row_inside = rows < N
    clamped_rows = tl.minimum(rows, N - 1).to(tl.int64)[:, None]
    x_rows, ref_x_rows = x_ptr + clamped_rows * stride_x, ref_x_ptr + clamped_rows * stride_ref_x
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)

    split_column = split * SPLIT_TILES * BLOCK_V
    for tile in range(0, tl.minimum(SPLIT_TILES, tl.cdiv(V - split_column, BLOCK_V))):
        first_column = split_column + tile * BLOCK_V
        acc = project(x_rows, w_ptr, first_column, V, H, stride_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST, PRECISION)
        z = _capped(acc, bias_ptr, first_column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        acc = project(
            ref_x_rows, ref_w_ptr, first_column, V, H_REF, stride_ref_w, EVEN_H, BLOCK_N, BLOCK_V, BLOCK_H, UPCAST,
            PRECISION,
        )  # fmt: skip
        ref_z = _capped(acc, ref_bias_ptr, first_column, V, logit_scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP, BLOCK_V)
        sums = _take_kl(
            z, ref_z, sums, rows, row_inside, anchor_ptr, scale_ptr, ref_anchor_ptr, ref_scale_ptr, shift_ptr,
            target_ptr, kl_ptr, slab_ptr, first_column, V, begin, stride_slab, softcap, target_shift,
            HAS_SOFTCAP, HAS_TARGET, REVERSE, STORE, BLOCK_V,
        )  # fmt: skip

    tl.store(sum_ptr + split.to(tl.int64) * N + rows, sums, mask=row_inside)


@triton.jit
def kl_logits_persistent_kernel(
    x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    w_desc,  # (V, H), the slice, in blocks of (BLOCK_V, BLOCK_H)
    bias_ptr,  # (V,)
    ref_x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    ref_w_desc,  # (V, H), the slice, in blocks of (BLOCK_V, BLOCK_H)
    ref_bias_ptr, anchor_ptr, scale_ptr, ref_anchor_ptr, ref_scale_ptr, shift_ptr, target_ptr, kl_ptr, slab_ptr,
    sum_ptr, N, V,  # as in the kernel above
    H,  # of both models
    begin, stride_slab, logit_scale, softcap, target_shift,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TARGET: tl.constexpr,
    REVERSE: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, SPLIT_TILES: tl.constexpr,
    GROUP: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """As `softmax_sums_persistent_kernel`. One loop over H does both products: the compiler would not merge two."""
    row_blocks, splits = tl.cdiv(N, BLOCK_N), tl.cdiv(V, SPLIT_TILES * BLOCK_V)
    sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    tl.assume(H > 0)
    for step in tl.range(0, steps_of_program(row_blocks, splits, SPLIT_TILES), flatten=FLATTEN):
        row_block, split, tile = place_step(step, row_blocks, splits, SPLIT_TILES, GROUP)
        first_column = (split * SPLIT_TILES + tile) * BLOCK_V
        depth = H
        if not FLATTEN:
            depth = tl.where(first_column < V, H, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        ref_acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for h in range(0, depth, BLOCK_H):
            x, w = x_desc.load([row_block * BLOCK_N, h]), w_desc.load([first_column, h])
            ref_x, ref_w = ref_x_desc.load([row_block * BLOCK_N, h]), ref_w_desc.load([first_column, h])
            if UPCAST:
                x, w, ref_x, ref_w = x.to(tl.float32), w.to(tl.float32), ref_x.to(tl.float32), ref_w.to(tl.float32)
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
            ref_acc = tl.dot(ref_x, ref_w.T, ref_acc, input_precision=PRECISION)
        z = _capped(acc, bias_ptr, first_column, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_V)
        ref_z = _capped(
            ref_acc, ref_bias_ptr, first_column, V, logit_scale, softcap, HAS_REF_BIAS, HAS_SOFTCAP, BLOCK_V
        )
        rows = _rows(row_block, slab_ptr, BLOCK_N, STORE and HAS_SOFTCAP and HAS_TARGET)
        sums = _take_kl(
            z, ref_z, tl.where(tile == 0, 0.0, sums), rows, rows < N, anchor_ptr, scale_ptr, ref_anchor_ptr,
            ref_scale_ptr, shift_ptr, target_ptr, kl_ptr, slab_ptr, first_column, V, begin, stride_slab, softcap,
            target_shift, HAS_SOFTCAP, HAS_TARGET, REVERSE, STORE, BLOCK_V,
        )  # fmt: skip
        done = rows < tl.where(tile == SPLIT_TILES - 1, N, 0)
        tl.store(sum_ptr + split.to(tl.int64) * N + rows, sums, mask=done)
