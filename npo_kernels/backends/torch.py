"""impl="torch": the primitives of `npo_kernels.core.backend` in plain PyTorch, for CPU, MPS and any GPU without Triton.

Everything is done in vocabulary blocks of fixed width, aligned to multiples of that width, whatever the workspace:
the partial sums, and with them the log-probabilities, do not depend on it. A block is also what stays in a CPU's
cache between the product, the exponential and the sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from npo_kernels.core import matmul
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.layout import DEAD_ROW
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import Statistics, anchor_headroom, gradient_coefficients
from npo_kernels.core.softmax_stats import row_statistics as row_statistics  # a primitive like those below

BLOCK_V = 8192  # columns of one block
BLOCK_N = 256  # rows of one block when nothing has to be kept
ROW_TEMPORARIES = 24  # bytes for each feature of a row where weight and rows meet: six float32 arrays at most
KL_TEMPORARIES = 10  # float32 arrays of the size of a block's logits


def block_v(x: Tensor) -> int:
    """Columns of one partial sum."""
    return BLOCK_V


def slab_dtype(x: Tensor) -> torch.dtype:
    """What the exponentials are stored in: the input dtype where float32-accumulating products of it exist."""
    return x.dtype if x.is_cuda else torch.float32


def describe(x: Tensor) -> str:
    """The width of the blocks, in one line."""
    return f"PyTorch on {x.device.type}, blocks of {BLOCK_V} columns"


def scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """The float32 copies that products of 16-bit operands take, the softcap's derivative, blocks of sums."""
    hidden_size = x.shape[1]
    n, columns = min(rows, BLOCK_N), min(vocab_size, BLOCK_V)
    upcast = matmul.upcast_bytes(x, hidden_size, 1)  # of a row, and of a column of the head
    product = matmul.upcast_bytes(x, vocab_size, hidden_size)  # of the head in a product with exponentials
    wide = 4 * columns if slab_dtype(x) != torch.float32 else 0  # a block is float32 before it is stored
    slope = 4 * columns if capped else 0
    sums, finish = 8 * -(-vocab_size // BLOCK_V), n * hidden_size * ROW_TEMPORARIES
    forward = upcast * columns + n * (upcast + 4 * columns + slope)
    return Scratch(
        projecting=max(upcast * columns, product),
        finishing=finish,
        per_row=upcast + wide + slope + sums,
        sums=max(forward, finish) + rows * sums,
    )


def kl_scratch(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
    """BLOCK_N rows of the logits of both models, and what is between them and the sums."""
    vocab_size = head.weight.shape[0]
    n, columns = min(x.shape[0], BLOCK_N), min(vocab_size, BLOCK_V)
    upcast = max(matmul.upcast_bytes(t, t.shape[1], columns + n) for t in (x, ref_x))
    product = matmul.upcast_bytes(x, vocab_size, x.shape[1])
    block = 4 * n * columns
    temporaries = KL_TEMPORARIES + (2 if head.softcap is not None else 0)
    # an operand is copied while little else exists
    projecting = max(temporaries * block, (temporaries - 8) * block + upcast, product)
    per_row = 12 * -(-vocab_size // BLOCK_V) + 40
    return Scratch(projecting, n * x.shape[1] * ROW_TEMPORARIES, per_row, projecting + x.shape[0] * per_row)


def target_logits(x: Tensor, head: Head, target: Tensor) -> Tensor:
    """(N,) float32 logit of each row's target; NaN for a poisoned row (target == V), the anchor of the exponentials."""
    vocab_size = head.weight.shape[0]
    label = target.clamp(0, vocab_size - 1)
    z = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        z[rows] = (x[rows].float() * head.weight[label[rows]].float()).sum(1)
    if head.bias is not None:
        z += head.bias[label].float()
    z *= head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.where(target == vocab_size, torch.nan, z)


def logits_block(x: Tensor, head: Head, out: Tensor) -> Tensor:
    """Logits of one block into `out` (rows, columns) float32, before the softcap."""
    if x.dtype == torch.float32:
        torch.mm(x, head.weight.t(), out=out)
    elif x.is_cuda:
        out.copy_(matmul.matmul(x, head.weight.t()))
    else:
        matmul.matmul(x, head.weight.t(), out=out.zero_())
    if head.bias is not None:
        out += head.bias.float()
    if head.logit_scale != 1.0:
        out *= head.logit_scale
    return out


def exp_logits(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(slab, partial sums, anchor): the exponentials of a vocabulary slice, their anchor raised where it has to be."""
    slab = _empty_slab(x, columns)
    return slab, *_exponentials(x, head, target, anchor, columns, slab)


def exp_logits_at(x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]) -> Tensor:
    """The slab alone, at an anchor that is high enough."""
    slab = _empty_slab(x, columns)
    _exponentials(x, head, target, anchor, columns, slab, reanchor=False)
    return slab


def _empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    return torch.empty(x.shape[0], columns[1] - columns[0], dtype=slab_dtype(x), device=x.device)


def _exponentials(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary
    target: Tensor,  # (n,)
    anchor: Tensor,  # (n,) float32
    columns: tuple[int, int],
    slab: Tensor | None,  # written, if given
    reanchor: bool = True,
) -> tuple[Tensor, Tensor]:
    """(partial sums (blocks, n), anchor): blocks of BLOCK_V columns from the begin of the slice.

    The sums are of the exponentials; what is stored carries the derivative of the softcap, dz/draw =
    1 - (z/softcap)^2, as the gradient products need it. Where the anchor of a row is raised, what was already computed
    is rescaled (the overflow repair).
    """
    begin, end = columns
    dtype = slab_dtype(x)
    direct = slab is not None and dtype == torch.float32
    block = x.new_empty(0 if direct else x.shape[0], min(BLOCK_V, end - begin), dtype=torch.float32)
    parts: list[Tensor] = []
    headroom = anchor_headroom(dtype)
    for b in range(begin, end, BLOCK_V):
        stop = min(b + BLOCK_V, end)
        stored = None if slab is None else slab[:, b - begin : stop - begin]
        out = stored if stored is not None and direct else block[:, : stop - b]
        z = logits_block(x, head.columns(b, stop), out)
        t = None
        if head.softcap is not None:
            t = torch.div(z, head.softcap).tanh_()
            torch.mul(t, head.softcap, out=z)
        if reanchor:
            raised = z.amax(1) - headroom
            if bool((raised > anchor).any()):
                raised = torch.where(raised > anchor, raised, anchor)
                factor = torch.exp(anchor - raised)
                anchor = raised
                parts = [part * factor for part in parts]
                if slab is not None:
                    slab[:, : b - begin] *= factor.unsqueeze(1).to(dtype)
        e = z.sub_(anchor.unsqueeze(1)).exp_()
        _zero_target(e, target - b)
        parts.append(e.sum(1))
        if stored is not None:
            if t is not None:
                e.mul_(t.square_().neg_().add_(1.0))
            if not direct:
                stored.copy_(e)
    return torch.stack(parts), anchor


def resum(x: Tensor, head: Head, target: Tensor, anchor: Tensor, raised: Tensor, parts: Tensor) -> None:
    """Overwrite the partial sums of the rows in `raised` (n,) bool by those at their anchor."""
    rows = raised.nonzero().squeeze(1)
    columns = (0, head.weight.shape[0])
    for i in range(0, rows.shape[0], BLOCK_N):
        some = rows[i : i + BLOCK_N]
        exact, _ = _exponentials(x[some], head, target[some], anchor[some], columns, slab=None, reanchor=False)
        parts[:, some] = exact


def kl_logits(
    x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, normalizers: tuple[Tensor, ...], columns: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(slab, partial sums of KL): p - q of a vocabulary slice, times the derivative of the softcap."""
    slab = _empty_slab(x, columns)
    return slab, _kl(x, head, ref_x, ref_head, normalizers, columns, slab)


def kl_sums(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, normalizers: tuple[Tensor, ...]) -> Tensor:
    """The partial sums of KL of the whole vocabulary, with nothing of size V kept."""
    return _kl(x, head, ref_x, ref_head, normalizers, (0, head.weight.shape[0]), slab=None)


def _kl(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary, as is ref_head
    ref_x: Tensor,  # (n, H_ref)
    ref_head: Head,
    normalizers: tuple[Tensor, ...],  # (n,) each: `softmax_stats.Normalizers.vectors`
    columns: tuple[int, int],  # the vocabulary slice
    slab: Tensor | None,  # written, if given
) -> Tensor:
    """Partial sums of KL (blocks, n)."""
    begin, end = columns
    parts = torch.empty(-(-(end - begin) // BLOCK_V), x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        anchor, scale, ref_anchor, ref_scale, shift = (vector[rows].unsqueeze(1) for vector in normalizers)
        for number, b in enumerate(range(begin, end, BLOCK_V)):
            stop = min(b + BLOCK_V, end)
            z, slope = _capped_logits(x[rows], head.columns(b, stop))
            ref_z, _ = _capped_logits(ref_x[rows], ref_head.columns(b, stop))
            below, ref_below = z.sub_(anchor), ref_z.sub_(ref_anchor)
            d = (below - ref_below).sub_(shift)
            p, q = below.exp_().mul_(scale), ref_below.exp_().mul_(ref_scale)
            gradient = torch.where(d.abs() < 0.5, q * torch.expm1(d), p - q)
            parts[number, rows] = torch.where(d.abs() < 0.5, q * _expm1_minus(d), gradient - q * d).sum(1)
            if slab is not None:
                slab[rows, b - begin : stop - begin] = gradient if slope is None else gradient * slope
            del z, ref_z, below, ref_below, d, p, q, gradient, slope  # before the next block's are made
    return parts


def softmax_sums(x: Tensor, head: Head, beside: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, sums of the exponentials below them), (blocks, n) float32, of the logits of a whole head.

    In the blocks of `kl_logits`, so that the logits have the same bits there.
    """
    vocab_size = head.weight.shape[0]
    maxima, sums = torch.empty(2, -(-vocab_size // BLOCK_V), x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        for number, b in enumerate(range(0, vocab_size, BLOCK_V)):
            z, _ = _capped_logits(x[rows], head.columns(b, min(b + BLOCK_V, vocab_size)))
            maxima[number, rows] = z.amax(1)
            sums[number, rows] = z.sub_(maxima[number, rows].unsqueeze(1)).exp_().sum(1)
    return maxima, sums


def _capped_logits(x: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """(n, columns) float32 logits of some columns, and the derivative of the softcap."""
    z = logits_block(x, head, torch.empty(x.shape[0], head.weight.shape[0], dtype=torch.float32, device=x.device))
    if head.softcap is None:
        return z, None
    t = torch.tanh(z / head.softcap)
    return t * head.softcap, 1 - t * t


def _expm1_minus(d: Tensor) -> Tensor:
    """exp(d) - 1 - d for |d| < 1/2: its series, truncated below 1e-8 relative."""
    tail = torch.zeros_like(d)
    for k in (40320, 5040, 720, 120, 24, 6, 2):
        tail = tail * d + 1.0 / k
    return d * d * tail


def _zero_target(e: Tensor, column: Tensor) -> None:
    """e[i, column_i] = 0 where column_i lies inside the block."""
    inside = (column >= 0) & (column < e.shape[1])
    column = column.clamp(0, e.shape[1] - 1).unsqueeze(1)
    kept = e.gather(1, column).squeeze(1)
    e.scatter_(1, column, torch.where(inside, 0.0, kept).unsqueeze(1))


def partial_sums(x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """(partial sums of the whole vocabulary, the anchor they ended with), with nothing of size V kept."""
    found = []
    for i in range(0, max(1, x.shape[0]), BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        columns = (0, head.weight.shape[0])
        found.append(_exponentials(x[rows], head, target[rows], anchor[rows], columns, slab=None))
    parts, anchors = zip(*found, strict=True)
    return torch.cat(parts, 1), torch.cat(anchors)


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """scale_i * x_i, rounded once to the dtype the gradient products take; a row of scale 0 is exactly 0."""
    out = torch.empty(x.shape, dtype=slab_dtype(x), device=x.device)
    for i in range(0, x.shape[0], BLOCK_N):
        factor = scale[i : i + BLOCK_N].unsqueeze(1)
        out[i : i + BLOCK_N] = torch.where(factor == 0, 0.0, x[i : i + BLOCK_N] * factor)
    return out


def finish_hidden_grad(
    product: Tensor,  # (n, H) float32: E @ W
    row_coef: Tensor,  # (n,)
    target_coef: Tensor,  # (n,)
    head: Head,
    target: Tensor,  # (n,)
    index: Tensor,  # (n,) rows of `out`
    out: Tensor,  # (T, H)
) -> None:
    """out[index_i] = target_coef_i W[target_i] - row_coef_i product_i; filling rows are not written."""
    label = target.clamp(0, head.weight.shape[0] - 1)
    for i in range(0, product.shape[0], BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        here = torch.where(target[rows] >= 0, target_coef[rows], 0.0)
        grad = here.unsqueeze(1) * head.weight[label[rows]].float() - row_coef[rows].unsqueeze(1) * product[rows]
        # filling rows share index 0 with a real one: add zero instead of overwriting
        live = (target[rows] != DEAD_ROW).unsqueeze(1)
        out.index_add_(0, index[rows], torch.where(live, grad, 0.0).to(out.dtype))


def group_targets(target: Tensor) -> Tensor:
    """What `add_targets` needs to know about the labels; computed once a call."""
    return target


def add_targets(grad: Tensor, x: Tensor, coef: Tensor, targets: Tensor, columns: tuple[int, int]) -> None:
    """grad[y_i - begin] += coef_i x_i in float32 for the rows whose target lies in the slice [begin, end)."""
    begin, end = columns
    inside = (targets >= begin) & (targets < end)
    column = (targets - begin).clamp(0, end - begin - 1)
    for i in range(0, x.shape[0], BLOCK_N):
        rows = slice(i, i + BLOCK_N)
        update = torch.where(inside[rows], coef[rows], 0.0).unsqueeze(1) * x[rows].float()
        _add_rows(grad, column[rows], update)


def sequence_sums(values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
    """(n,) row values -> (B,) sums in row order; rows of sequence B (filling) are left out."""
    num_sequences = starts.shape[0] - 1
    sums = torch.zeros(num_sequences + 1, dtype=torch.float32, device=values.device)
    _add_rows(sums, sequence, values)
    return sums[:num_sequences]


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index_i] += rows_i, in row order on every device: on CUDA index_add_ promises no order, index_put_ does."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)


def ratio_epilogue(
    stats: Statistics,
    sequence: Tensor,  # (n,) sequence of each row, counted from the first of the chunk
    starts: Tensor,  # (B+1,) first row of each sequence, counted from the first of the chunk
    ratio: RatioLoss,  # of the sequences of the chunk
    head: Head,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)): from rows to sequences, the loss, and back."""
    logps = sequence_sums(stats.logp, sequence, starts)
    losses, grad = ratio.value_and_grad(logps)
    row_coef, target_coef = gradient_coefficients(stats, F.pad(grad, (0, 1))[sequence], head)
    return logps, losses, row_coef, target_coef
