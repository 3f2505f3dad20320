"""Anchored exponentials of the logits, and their sums."""

import math

import torch
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core import cpu, matmul
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import anchor_headroom


def scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """Float32 copies of 16-bit operands, the derivative of the softcap, and partial sums."""
    hidden_size = x.shape[1]
    n, columns = min(rows, blocks.BLOCK_N), min(vocab_size, blocks.BLOCK_V)
    copies = matmul.project_bytes(x, 0, columns)  # of the head
    # per row: its copy, and its float32 exponentials before they are stored in another dtype
    row = matmul.project_bytes(x, 1, 0) + (4 * columns if blocks.slab_dtype(x) != torch.float32 else 0)
    slope = 4 * columns * min(rows, blocks.cached_rows(x)) if capped else 0
    # copy of the head in the product of the slab and the head
    product = 0 if cpu.native(x) else matmul.upcast_bytes(x, vocab_size, hidden_size)
    # sums: per row, the partial sums twice, and the anchor
    sums, finish = 8 * -(-vocab_size // blocks.BLOCK_V) + 8, n * hidden_size * blocks.ROW_TEMPORARIES
    forward = copies + n * (matmul.project_bytes(x, 1, 0) + 4 * columns) + slope
    return Scratch(
        projecting=max(copies + slope, product),
        finishing=finish,
        per_row=row + sums,
        sums=max(forward, finish) + rows * sums,
    )


def target_logits(x: Tensor, head: Head, target: Tensor) -> Tensor:
    """(N,) float32 logit of each row's target, which anchors the exponentials; NaN for a poisoned row (target == V)."""
    vocab_size = head.weight.shape[0]
    label = target.clamp(0, vocab_size - 1)
    z = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        z[rows] = (x[rows].float() * head.weight[label[rows]].float()).sum(1)
    if head.bias is not None:
        z += head.bias[label].float()
    z *= head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.where(target == vocab_size, torch.nan, z)


def exp_logits(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int], out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(slab, partial sums, anchor) of a vocabulary slice; the anchor is raised where a logit exceeds its headroom."""
    slab = blocks.empty_slab(x, columns) if out is None else out
    return slab, *_exponentials(x, head, target, anchor, columns, slab)


def exp_logits_at(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Only the slab, at an anchor that is already high enough."""
    slab = blocks.empty_slab(x, columns) if out is None else out
    _exponentials(x, head, target, anchor, columns, slab, reanchor=False)
    return slab


def partial_sums(x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """(partial sums of the whole vocabulary, their anchor, raised where necessary); keeps nothing of size V."""
    found = []
    for i in range(0, max(1, x.shape[0]), blocks.BLOCK_N):
        rows = slice(i, i + blocks.BLOCK_N)
        columns = (0, head.weight.shape[0])
        found.append(_exponentials(x[rows], head, target[rows], anchor[rows], columns, slab=None))
    parts, anchors = zip(*found, strict=True)
    return torch.cat(parts, 1), torch.cat(anchors)


def _exponentials(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary
    target: Tensor,  # (n,)
    anchor: Tensor,  # (n,) float32
    columns: tuple[int, int],
    slab: Tensor | None,  # written, if given
    reanchor: bool = True,
) -> tuple[Tensor, Tensor]:
    """(partial sums (blocks, n), anchor), for blocks of blocks.BLOCK_V columns from the start of the slice.

    The stored exponentials include the derivative of the softcap, 1 - (z/softcap)^2, which the gradient products need;
    the sums do not. If the anchor of a row is raised, its earlier results are rescaled (overflow repair).
    """
    begin, end = columns
    n, dtype = x.shape[0], blocks.slab_dtype(x)
    direct = slab is not None and dtype == torch.float32
    block = x.new_empty(0 if direct else n, min(blocks.BLOCK_V, end - begin), dtype=torch.float32)
    parts = x.new_empty(-(-(end - begin) // blocks.BLOCK_V), n, dtype=torch.float32)
    anchor = anchor.clamp(min=torch.finfo(torch.float32).min)  # target logit -inf: exp(-inf - -inf) would be NaN
    step = blocks.cached_rows(x)
    for number, b in enumerate(range(begin, end, blocks.BLOCK_V)):
        stop = min(b + blocks.BLOCK_V, end)
        part = head.columns(b, stop)
        stored = None if slab is None else slab[:, b - begin : stop - begin]
        z = blocks.logits_block(x, part, stored if stored is not None and direct else block[:, : stop - b])
        for i in range(0, n, step):
            rows = slice(i, i + step)
            e, slope, sums, highest = _anchored(z[rows], part, target[rows] - b, anchor[rows], dtype)
            if reanchor and bool((highest > math.exp(anchor_headroom(dtype))).any()):
                raised = _raised(x[rows], part, anchor[rows], e, dtype)
                factor = torch.exp(anchor[rows] - raised)
                anchor[rows] = raised
                parts[:number, rows] *= factor
                if slab is not None:
                    slab[rows, : b - begin] *= factor.unsqueeze(1).to(dtype)
                blocks.logits_block(x[rows], part, e)
                e, slope, sums, _ = _anchored(e, part, target[rows] - b, raised, dtype)
            parts[number, rows] = sums
            if stored is not None:
                if slope is not None:
                    e.mul_(slope)
                if not direct:
                    stored[rows] = e
            del slope  # free it before the next one is allocated
    return parts, anchor


def _anchored(
    z: Tensor, head: Head, column: Tensor, anchor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(exponentials, derivative of the softcap or None, sums, upper bound of the exponentials), computed in place of z.

    A bound above exp(headroom) means that the anchor may have to be raised. The sum of a row is such a bound. float16
    has so little headroom that the sum would nearly always exceed it, so there the bound is the exact maximum.
    """
    slope = None
    if head.softcap is not None:
        slope = torch.div(z, head.softcap).tanh_()
        torch.mul(slope, head.softcap, out=z)
        slope.square_().neg_().add_(1.0)
    e = z.sub_(anchor.unsqueeze(1)).exp_()
    at_target = blocks.zero_target(e, column)
    sums = e.sum(1)
    return e, slope, sums, torch.maximum(e.amax(1) if dtype == torch.float16 else sums, at_target)


def _raised(x: Tensor, head: Head, anchor: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """The anchor, raised where a logit of the block exceeds it by more than the headroom; overwrites z."""
    blocks.logits_block(x, head, z)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    lowest = z.amax(1) - anchor_headroom(dtype)
    return torch.where(lowest > anchor, lowest, anchor)


def resum(x: Tensor, head: Head, target: Tensor, anchor: Tensor, raised: Tensor, parts: Tensor) -> None:
    """Recompute the partial sums of the rows in `raised` (n,) bool at their anchor, in place."""
    rows = raised.nonzero().squeeze(1)
    columns = (0, head.weight.shape[0])
    for i in range(0, rows.shape[0], blocks.BLOCK_N):
        some = rows[i : i + blocks.BLOCK_N]
        exact, _ = _exponentials(x[some], head, target[some], anchor[some], columns, slab=None, reanchor=False)
        parts[:, some] = exact
