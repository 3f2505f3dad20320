"""Device functions that several kernels share. Portable Triton: no libdevice, so that the interpreter runs them."""

import triton
import triton.language as tl


@triton.jit
def log1p(s):
    """log(1 + s) for s >= 0 with full relative precision near 0, where the hardware logarithm has none.

    For s <= 1/2 the series of 2 atanh(t), t = s / (2 + s) <= 1/5, truncated below 1e-9 relative.
    """
    t = s / (2.0 + s)
    u = t * t
    series = 2.0 * t * (1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u * (1.0 / 9 + u * (1.0 / 11))))))
    return tl.where(s <= 0.5, series, tl.log(1.0 + s))


@triton.jit
def softplus(a):
    """log(1 + exp(a)), for any a."""
    return tl.maximum(a, 0.0) + log1p(tl.exp(-tl.abs(a)))


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), relative precision kept for a -> -inf."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """tanh with relative precision near 0: its series there, exponentials elsewhere."""
    u = x * x
    series = x * (1.0 + u * (-1.0 / 3 + u * (2.0 / 15 + u * (-17.0 / 315 + u * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    outer = (1.0 - e) / (1.0 + e)
    return tl.where(u < 0.0625, series, tl.where(x < 0, -outer, outer))


@triton.jit
def place(program, row_blocks, splits, GROUP: tl.constexpr):
    """(row block, split) of a program of a product: GROUP row blocks run through the splits together.

    A group's rows and the current splits' columns of the head stay in L2. The last group may be smaller.
    """
    first = program // (GROUP * splits) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % (GROUP * splits) % size, program % (GROUP * splits) // size


@triton.jit
def pieces_of(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """The columns of t in PIECES equal parts, a power of two, from left to right: registers renamed, nothing moved."""
    if PIECES == 1:
        return (t,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(t, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        left = pieces_of(left, ROWS, COLUMNS // 2, PIECES // 2)
        return left + pieces_of(right, ROWS, COLUMNS // 2, PIECES // 2)


@triton.jit
def project(
    x_rows,  # (BLOCK_N, 1) pointers to rows of x
    w_ptr,  # (V, H)
    first_column,
    V,
    H,
    stride_w,
    EVEN_H: tl.constexpr,  # H is a multiple of BLOCK_H
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bfloat16: give it float32
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
):
    """(BLOCK_N, BLOCK_V) float32 tile of x W^T from `first_column` on; columns beyond V repeat the last one."""
    depth = tl.arange(0, BLOCK_H)
    clamped = tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
    w_columns = w_ptr + clamped[None, :] * stride_w
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(x_rows + (h + depth)[None, :])
            w = tl.load(w_columns + (h + depth)[:, None])
        else:
            inside = h + depth < H
            x = tl.load(x_rows + (h + depth)[None, :], mask=inside[None, :], other=0.0)
            w = tl.load(w_columns + (h + depth)[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def project_unaligned(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    first_row,
    first_column,
    N,
    V,
    H,
    stride_x,
    stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`project` of rows that do not begin at multiples of 16 bytes, with the same bits.

    They are read element by element, and pointers of 64 bits to all rows would fill the registers of a thread. Here
    they are offsets of 32 bits, and a minimum keeps the compiler from making running pointers of those again.
    """
    depth = tl.arange(0, BLOCK_H)
    x_first = x_ptr + tl.cast(first_row, tl.int64) * stride_x
    w_first = w_ptr + tl.cast(first_column, tl.int64) * stride_w
    x_rows = (tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_row) * stride_x)[:, None]
    w_columns = (tl.minimum(tl.arange(0, BLOCK_V), V - 1 - first_column) * stride_w)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        inside = h + depth < H
        x = tl.load(x_first + (x_rows + (h + depth)[None, :]), mask=inside[None, :], other=0.0)
        w = tl.load(w_first + (w_columns + tl.minimum(h + depth, H - 1)[:, None]), mask=inside[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def project_descriptors(
    x_desc,  # (N, H) in blocks of (BLOCK_N, BLOCK_H)
    w_desc,  # (V, H) in blocks of (BLOCK_V, BLOCK_H)
    first_row,
    first_column,
    H,  # 0: no product, all zeros
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`project` through tensor descriptors, with the same bits; columns beyond V are products with zeros."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        x, w = x_desc.load([first_row, h]), w_desc.load([first_column, h])
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def steps_of_program(row_blocks, splits, SPLIT_TILES: tl.constexpr):
    """Tiles that a program of a persistent kernel does one after the other: of every so many-th piece of work."""
    return tl.cdiv(row_blocks * splits - tl.program_id(0), tl.num_programs(0)) * SPLIT_TILES


@triton.jit
def place_step(step, row_blocks, splits, SPLIT_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row block, split, tile of the split) of a step of a persistent program."""
    piece = tl.program_id(0) + step // SPLIT_TILES * tl.num_programs(0)
    row_block, split = place(piece, row_blocks, splits, GROUP)
    return row_block, split, step % SPLIT_TILES
