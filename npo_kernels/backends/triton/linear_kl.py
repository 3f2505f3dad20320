"""Launches of two projections at once: the sums and the gradient of KL(reference || model)."""

import torch
import triton
from torch import Tensor

from csrc_triton.linear_kl import kl_logits_kernel, softmax_sums_kernel
from csrc_triton.tiles import PAIR_TILES, Tile
from npo_kernels.backends.tiles import find_tile
from npo_kernels.backends.triton import launch
from npo_kernels.backends.triton.exp_logits import SORT_BYTES
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch


def kl_scratch(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
    """Maxima and sums of both models, and the partial sums of KL."""
    per_row = 24 * triton.cdiv(head.weight.shape[0], _pair_tile(x, ref_x).split) + SORT_BYTES
    return Scratch(per_row=per_row, sums=per_row * x.shape[0])


def _pair_tile(x: Tensor, ref_x: Tensor) -> Tile:
    bits, depth = 8 * max(x.itemsize, ref_x.itemsize), max(x.shape[1], ref_x.shape[1])
    return find_tile(PAIR_TILES, launch.architecture(x.device), bits, depth)


def softmax_sums(x: Tensor, head: Head, beside: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, sums of the exponentials below them), (splits, n) float32, of the logits of a whole head.

    `beside`: the rows of the other model, as `kl_logits` will get them, which takes the same tile.
    """
    x, weight = launch.rows_contiguous(x), launch.rows_contiguous(head.weight)
    rows, tile = x.shape[0], _pair_tile(x, beside)
    splits = triton.cdiv(weight.shape[0], tile.split)
    maxima, sums = torch.empty(2, splits, rows, dtype=torch.float32, device=x.device)
    if rows:
        softmax_sums_kernel[(triton.cdiv(rows, tile.block_n) * splits,)](
            x, weight, head.bias, maxima, sums, rows, weight.shape[0], x.shape[1], x.stride(0), weight.stride(0),
            head.logit_scale, head.softcap or 0.0, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, EVEN_H=x.shape[1] % tile.block_h == 0,
            BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, SPLIT_TILES=tile.split_tiles,
            GROUP=tile.group, UPCAST=launch.INTERPRETED and x.dtype == torch.bfloat16, PRECISION=launch.precision(x),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return maxima, sums


def kl_logits(
    x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, normalizers: tuple[Tensor, ...], columns: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(slab, partial sums of KL): p - q of a vocabulary slice, times the derivative of the softcap."""
    slab = launch.aligned_empty(x.shape[0], columns[1] - columns[0], x)
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
    """Partial sums of KL (splits, n)."""
    x, ref_x = launch.rows_contiguous(x), launch.rows_contiguous(ref_x)
    part, ref_part = head.columns(*columns), ref_head.columns(*columns)
    weight, ref_weight = launch.rows_contiguous(part.weight), launch.rows_contiguous(ref_part.weight)
    rows, width = x.shape[0], columns[1] - columns[0]
    tile = _pair_tile(x, ref_x)
    splits = triton.cdiv(width, tile.split)
    parts = torch.empty(splits, rows, dtype=torch.float32, device=x.device)
    if rows:
        kl_logits_kernel[(triton.cdiv(rows, tile.block_n) * splits,)](
            x, weight, part.bias, ref_x, ref_weight, ref_part.bias, *normalizers, slab, parts,
            rows, width, x.shape[1], ref_x.shape[1], x.stride(0), weight.stride(0), ref_x.stride(0),
            ref_weight.stride(0), 0 if slab is None else slab.stride(0), head.logit_scale, head.softcap or 0.0,
            HAS_BIAS=part.bias is not None, HAS_REF_BIAS=ref_part.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, STORE=slab is not None,
            EVEN_H=x.shape[1] % tile.block_h == ref_x.shape[1] % tile.block_h == 0,
            BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, SPLIT_TILES=tile.split_tiles,
            GROUP=tile.group, UPCAST=launch.INTERPRETED and torch.bfloat16 in (x.dtype, ref_x.dtype),
            PRECISION=launch.precision(x), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts
