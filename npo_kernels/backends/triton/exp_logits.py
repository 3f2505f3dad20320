"""Launches of the product with the exponential epilogue, and of the repair of its anchors."""

import torch
from torch import Tensor

from csrc_triton.exp_logits import exp_logits_kernel, exp_logits_persistent_kernel
from csrc_triton.row_statistics import reanchor_kernel, row_statistics_kernel
from csrc_triton.target_logit import target_logit_kernel
from csrc_triton.tiles import BLOCK_ROWS, ROW_WARPS
from npo_kernels.backends.triton import launch
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import Statistics, anchor_headroom

SORT_BYTES = 48  # per row: the sorted targets, their order, and the copies that torch.sort makes


def scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """Partial sums and maxima of the splits, and the sorted targets: a few numbers per row.

    The workspace that cuBLAS allocates once per process (about 32 MiB) is not counted.
    """
    per_row = 12 * launch.cdiv(vocab_size, launch.block_v(x)) + SORT_BYTES
    return Scratch(per_row=per_row, sums=per_row * rows)


def target_logits(x: Tensor, head: Head, target: Tensor) -> Tensor:
    """(N,) float32 logit of each row's target, which anchors the exponentials; NaN for a poisoned row."""
    x, weight = launch.rows_contiguous(x), launch.rows_contiguous(head.weight)
    z = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        target_logit_kernel[(x.shape[0],)](
            x, weight, head.bias, target, z, weight.shape[0], x.shape[1], x.stride(0), weight.stride(0),
            head.logit_scale, head.softcap or 0.0,
            HAS_BIAS=head.bias is not None, HAS_SOFTCAP=head.softcap is not None,
            BLOCK_H=launch.hidden_block(x.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip
    return z


def exp_logits(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int], out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(slab, partial sums, anchor) of a vocabulary slice; the anchor is raised where a logit exceeds its headroom."""
    slab = launch.empty_slab(x, columns) if out is None else out
    return slab, *_exponentials(x, head, target, anchor, columns, slab)


def exp_logits_at(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Only the slab, at an anchor that is already high enough."""
    slab = launch.empty_slab(x, columns) if out is None else out
    launch_exp_logits(x, head, target, anchor, columns, slab)
    return slab


def partial_sums(x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """(partial sums of the whole vocabulary, their anchor, raised where necessary); writes nothing of size V."""
    return _exponentials(x, head, target, anchor, (0, head.weight.shape[0]), slab=None)


def _exponentials(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary
    target: Tensor,  # (n,)
    anchor: Tensor,  # (n,) float32
    columns: tuple[int, int],
    slab: Tensor | None,  # written, if given
) -> tuple[Tensor, Tensor]:
    """(partial sums (splits, n), anchor). Row blocks whose anchor was raised are computed a second time."""
    rows, tile = x.shape[0], launch.tile_for(x)
    splits = launch.cdiv(columns[1] - columns[0], tile.split)
    parts, maxima = torch.empty(2, splits, rows, dtype=torch.float32, device=x.device)
    launch_exp_logits(x, head, target, anchor, columns, slab, parts, maxima)
    raised = torch.empty_like(anchor)
    row_blocks = launch.cdiv(rows, tile.block_n)
    dirty = torch.empty(row_blocks, dtype=torch.int32, device=x.device)
    if rows:
        reanchor_kernel[(row_blocks,)](
            maxima, anchor, raised, dirty, rows, splits, anchor_headroom(launch.slab_dtype(x)), BLOCK_N=tile.block_n
        )
    launch_exp_logits(x, head, target, raised, columns, slab, parts, dirty=dirty)
    return parts, raised


def resum(x: Tensor, head: Head, target: Tensor, anchor: Tensor, raised: Tensor, parts: Tensor) -> None:
    """Recompute the partial sums of the rows in `raised` (n,) bool at their anchor, in place and in one launch.

    Every row block with such a row is recomputed; the sums of its other rows come out unchanged.
    """
    block_n = launch.tile_for(x).block_n
    filled = torch.nn.functional.pad(raised, (0, -raised.shape[0] % block_n))
    dirty = filled.view(-1, block_n).any(1).int()
    launch_exp_logits(x, head, target, anchor, (0, head.weight.shape[0]), None, parts, dirty=dirty)


def launch_exp_logits(
    x: Tensor,
    head: Head,
    target: Tensor,
    anchor: Tensor,
    columns: tuple[int, int],
    slab: Tensor | None = None,  # written if given
    parts: Tensor | None = None,  # (splits, n) partial sums, written if given
    maxima: Tensor | None = None,  # (splits, n), written if given
    dirty: Tensor | None = None,  # (row blocks,) int32; if given, only nonzero blocks are computed
) -> None:
    """One launch; the tile and the strides of the operands select the kernel."""
    if not x.shape[0]:
        return
    x, part = launch.rows_contiguous(x), head.columns(*columns)
    weight = launch.rows_contiguous(part.weight)
    tile = launch.tile_for(x)
    splits = launch.cdiv(x.shape[0], tile.block_n) * launch.cdiv(weight.shape[0], tile.split)
    vectors = part.bias, target, anchor, dirty, slab, parts, maxima
    sizes = x.shape[0], weight.shape[0], x.shape[1], columns[0]
    scalars = 0 if slab is None else slab.stride(0), head.logit_scale, head.softcap or 0.0
    constants = {
        "HAS_BIAS": part.bias is not None, "HAS_SOFTCAP": head.softcap is not None, "STORE": slab is not None,
        "SUMS": parts is not None, "MAXIMA": maxima is not None, "REPAIR": dirty is not None,
        "PIECES": tile.pieces, "UPCAST": launch.INTERPRETED and x.dtype == torch.bfloat16,
        **launch.tile_constants(tile, x),
    }  # fmt: skip
    descriptors = launch.descriptors(x, weight, tile)
    if descriptors:
        # a repair skips tiles, and without a store after each tile Triton before 3.9 fails to merge the loops
        merged = tile.loop != "serial" and dirty is None and parts is not None
        exp_logits_persistent_kernel[(min(splits, launch.processors(x.device)),)](
            *descriptors, *vectors, *sizes, *scalars, **constants,
            FLATTEN=merged, SPECIALIZE=merged and tile.loop == "specialized",
        )  # fmt: skip
    else:
        exp_logits_kernel[(splits,)](
            x, weight, *vectors, *sizes, x.stride(0), weight.stride(0), *scalars, **constants,
            EVEN_H=x.shape[1] % tile.block_h == 0, ALIGNED=launch.aligned(x, weight),
        )  # fmt: skip


def row_statistics(parts: Tensor, anchor: Tensor, target_logit: Tensor) -> Statistics:
    """Statistics of each row from the partial sums (splits, n) of the exponentials and their anchor."""
    logp, miss, prob_scale = (torch.empty_like(anchor) for _ in range(3))
    if anchor.shape[0]:
        row_statistics_kernel[launch.row_grid(anchor.shape[0])](
            parts, anchor, target_logit, logp, miss, prob_scale, anchor.shape[0], parts.shape[0],
            BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
    return Statistics(target_logit, logp, miss, anchor, prob_scale)
