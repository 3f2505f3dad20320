"""Device functions that several kernels share. They avoid libdevice, so that the interpreter can run them."""

import triton
import triton.language as tl


@triton.jit
def log1p(s):
    """log(1 + s) for s >= 0, with full relative precision near 0, where log(1 + s) loses it.

    For s <= 1/2 this is the series of 2 atanh(t), t = s / (2 + s) <= 1/5, with a relative truncation error below 1e-9.
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
    """1 / (1 + exp(-a)); keeps its relative precision for a -> -inf."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """tanh, with full relative precision near 0: the series for |x| < 1/4, exponentials elsewhere."""
    u = x * x
    series = x * (1.0 + u * (-1.0 / 3 + u * (2.0 / 15 + u * (-17.0 / 315 + u * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    outer = (1.0 - e) / (1.0 + e)
    return tl.where(u < 0.0625, series, tl.where(x < 0, -outer, outer))


@triton.jit
def place(program, row_blocks, splits, GROUP: tl.constexpr):
    """(row block, split) of a program of a product.

    GROUP consecutive row blocks go through the splits together, so that their rows and the current columns of the head
    stay in L2. The last group may be smaller.
    """
    first = program // (GROUP * splits) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % (GROUP * splits) % size, program % (GROUP * splits) // size


@triton.jit
def pieces_of(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """Split the columns of t into PIECES equal parts (a power of two), from left to right, without moving data."""
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
    UPCAST: tl.constexpr,  # to float32: the interpreter would multiply the raw bits of bfloat16
    PRECISION: tl.constexpr,  # of a float32 product: "ieee" or "tf32"
):
    """(BLOCK_N, BLOCK_V) float32 tile of x W^T, starting at `first_column`; columns beyond V repeat the last one."""
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
    """`project` for rows that do not start at multiples of 16 bytes; bitwise the same result.

    Such rows are loaded element by element, and one 64-bit pointer per row would use up a thread's registers. This
    version uses 32-bit offsets. The tl.minimum in the loop keeps the compiler from turning them into pointers again.
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
    """`project` through tensor descriptors; bitwise the same result, except that columns beyond V are 0."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        x, w = x_desc.load([first_row, h]), w_desc.load([first_column, h])
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def steps_of_program(row_blocks, splits, SPLIT_TILES: tl.constexpr):
    """Number of tiles that this program of a persistent kernel processes, one after the other.

    One piece of work is a split of a row block; program i takes pieces i, i + num_programs, i + 2 num_programs, ...
    """
    return tl.cdiv(row_blocks * splits - tl.program_id(0), tl.num_programs(0)) * SPLIT_TILES


@triton.jit
def place_step(step, row_blocks, splits, SPLIT_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row block, split, tile within the split) of one step of a persistent program."""
    piece = tl.program_id(0) + step // SPLIT_TILES * tl.num_programs(0)
    row_block, split = place(piece, row_blocks, splits, GROUP)
    return row_block, split, step % SPLIT_TILES
