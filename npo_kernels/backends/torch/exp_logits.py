"""Anchored exponentials of the logits, and their sums."""

import torch
from torch import Tensor

from npo_kernels.backends.torch import blocks
from npo_kernels.core import matmul
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import anchor_headroom


def scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """The float32 copies that products of 16-bit operands take, the softcap's derivative, blocks of sums."""
    hidden_size = x.shape[1]
    n, columns = min(rows, blocks.BLOCK_N), min(vocab_size, blocks.BLOCK_V)
    upcast = matmul.upcast_bytes(x, hidden_size, 1)  # of a row, and of a column of the head
    product = matmul.upcast_bytes(x, vocab_size, hidden_size)  # of the head in a product with exponentials
    wide = 4 * columns if blocks.slab_dtype(x) != torch.float32 else 0  # a block is float32 before it is stored
    slope = 4 * columns if capped else 0
    sums, finish = 8 * -(-vocab_size // blocks.BLOCK_V), n * hidden_size * blocks.ROW_TEMPORARIES
    forward = upcast * columns + n * (upcast + 4 * columns + slope)
    return Scratch(
        projecting=max(upcast * columns, product),
        finishing=finish,
        per_row=upcast + wide + slope + sums,
        sums=max(forward, finish) + rows * sums,
    )


def target_logits(x: Tensor, head: Head, target: Tensor) -> Tensor:
    """(N,) float32 logit of each row's target; NaN for a poisoned row (target == V), the anchor of the exponentials."""
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
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(slab, partial sums, anchor): the exponentials of a vocabulary slice, their anchor raised where it has to be."""
    slab = blocks.empty_slab(x, columns)
    return slab, *_exponentials(x, head, target, anchor, columns, slab)


def exp_logits_at(x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]) -> Tensor:
    """The slab alone, at an anchor that is high enough."""
    slab = blocks.empty_slab(x, columns)
    _exponentials(x, head, target, anchor, columns, slab, reanchor=False)
    return slab


def partial_sums(x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """(partial sums of the whole vocabulary, the anchor they ended with), with nothing of size V kept."""
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
    """(partial sums (blocks, n), anchor): blocks of blocks.BLOCK_V columns from the begin of the slice.

    The sums are of the exponentials; what is stored carries the derivative of the softcap, dz/draw =
    1 - (z/softcap)^2, as the gradient products need it. Where the anchor of a row is raised, what was already computed
    is rescaled (the overflow repair).
    """
    begin, end = columns
    dtype = blocks.slab_dtype(x)
    direct = slab is not None and dtype == torch.float32
    block = x.new_empty(0 if direct else x.shape[0], min(blocks.BLOCK_V, end - begin), dtype=torch.float32)
    parts: list[Tensor] = []
    headroom = anchor_headroom(dtype)
    for b in range(begin, end, blocks.BLOCK_V):
        stop = min(b + blocks.BLOCK_V, end)
        stored = None if slab is None else slab[:, b - begin : stop - begin]
        out = stored if stored is not None and direct else block[:, : stop - b]
        z = blocks.logits_block(x, head.columns(b, stop), out)
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
        blocks.zero_target(e, target - b)
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
    for i in range(0, rows.shape[0], blocks.BLOCK_N):
        some = rows[i : i + blocks.BLOCK_N]
        exact, _ = _exponentials(x[some], head, target[some], anchor[some], columns, slab=None, reanchor=False)
        parts[:, some] = exact
