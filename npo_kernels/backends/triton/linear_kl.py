"""Launches of the kernels for KL of a model and a reference, and its gradient."""

import torch
from torch import Tensor

from csrc_triton.linear_kl import (
    kl_logits_kernel,
    kl_logits_persistent_kernel,
    softmax_sums_kernel,
    softmax_sums_persistent_kernel,
)
from csrc_triton.tiles import PAIR_TILES, Tile
from npo_kernels.backends.tiles import find_tile
from npo_kernels.backends.triton import launch
from npo_kernels.backends.triton.exp_logits import SORT_BYTES
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import Divergence, Lowered


def kl_scratch(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
    """Maxima and sums of both models, and the partial sums of KL."""
    per_row = 24 * launch.cdiv(head.weight.shape[0], pair_tile(x, ref_x).split) + SORT_BYTES
    return Scratch(per_row=per_row, sums=per_row * x.shape[0])


def pair_tile(x: Tensor, ref_x: Tensor) -> Tile:
    """The tile of both KL kernels: with one tile, the logits are bitwise equal in both."""
    bits, depth = 8 * max(x.itemsize, ref_x.itemsize), max(x.shape[1], ref_x.shape[1])
    return find_tile(PAIR_TILES, launch.architecture(x.device), bits, depth)


def softmax_sums(x: Tensor, head: Head, beside: Tensor, lowered: Lowered | None) -> tuple[Tensor, Tensor]:
    """(maxima, sums of exp(z - maximum)), (splits, n) float32 each, over the whole vocabulary.

    `beside` are the rows of the other model; they matter only for the tile, which must be that of `kl_logits`.
    """
    x, weight = launch.rows_contiguous(x), launch.rows_contiguous(head.weight)
    rows, tile = x.shape[0], pair_tile(x, beside)
    splits = launch.cdiv(weight.shape[0], tile.split)
    maxima, sums = torch.empty(2, splits, rows, dtype=torch.float32, device=x.device)
    if not rows:
        return maxima, sums
    target, target_shift = _of_target(lowered)
    vectors = head.bias, target, maxima, sums
    sizes, scalars = (rows, *weight.shape), (head.logit_scale, head.softcap or 0.0, target_shift)
    constants = {
        "HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None, "HAS_TARGET": lowered is not None,
        "UPCAST": launch.INTERPRETED and x.dtype == torch.bfloat16, **launch.tile_constants(tile, x),
    }  # fmt: skip
    programs = launch.cdiv(rows, tile.block_n) * splits
    descriptors = launch.descriptors(x, weight, tile)
    if descriptors:
        softmax_sums_persistent_kernel[(min(programs, launch.processors(x.device)),)](
            *descriptors, *vectors, *sizes, *scalars, **constants, FLATTEN=tile.loop == "flat"
        )
    else:
        even = x.shape[1] % tile.block_h == 0
        softmax_sums_kernel[(programs,)](
            x, weight, *vectors, *sizes, x.stride(0), weight.stride(0), *scalars, **constants, EVEN_H=even
        )
    return maxima, sums


def _of_target(lowered: Lowered | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if lowered is None else (lowered.target, lowered.shift)


def kl_logits(
    x: Tensor,
    head: Head,
    ref_x: Tensor,
    ref_head: Head,
    divergence: Divergence,
    columns: tuple[int, int],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(slab, partial sums of KL); the slab is the gradient of the slice times the derivative of the softcap."""
    slab = launch.empty_slab(x, columns) if out is None else out
    return slab, _kl(x, head, ref_x, ref_head, divergence, columns, slab)


def kl_sums(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, divergence: Divergence) -> Tensor:
    """Partial sums of KL over the whole vocabulary; keeps nothing of size V."""
    return _kl(x, head, ref_x, ref_head, divergence, (0, head.weight.shape[0]), slab=None)


def _kl(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary, as is ref_head
    ref_x: Tensor,  # (n, H_ref)
    ref_head: Head,
    divergence: Divergence,
    columns: tuple[int, int],  # the vocabulary slice
    slab: Tensor | None,  # written, if given
) -> Tensor:
    """Partial sums of KL (splits, n)."""
    x, ref_x = launch.rows_contiguous(x), launch.rows_contiguous(ref_x)
    part, ref_part = head.columns(*columns), ref_head.columns(*columns)
    weight, ref_weight = launch.rows_contiguous(part.weight), launch.rows_contiguous(ref_part.weight)
    rows, width, lowered = x.shape[0], columns[1] - columns[0], divergence.lowered
    kl = divergence.kl if divergence.reverse and slab is not None else None
    tile = pair_tile(x, ref_x)
    splits = launch.cdiv(width, tile.split)
    parts = torch.empty(splits, rows, dtype=torch.float32, device=x.device)
    if not rows:
        return parts
    target, target_shift = _of_target(lowered)
    vectors = *divergence.vectors, target, kl, slab, parts
    scalars = 0 if slab is None else slab.stride(0), head.logit_scale, head.softcap or 0.0, target_shift
    constants = {
        "HAS_BIAS": part.bias is not None, "HAS_REF_BIAS": ref_part.bias is not None,
        "HAS_SOFTCAP": head.softcap is not None, "HAS_TARGET": lowered is not None, "REVERSE": divergence.reverse,
        "STORE": slab is not None, "UPCAST": launch.INTERPRETED and torch.bfloat16 in (x.dtype, ref_x.dtype),
        **launch.tile_constants(tile, x),
    }  # fmt: skip
    programs, depth, ref_depth = launch.cdiv(rows, tile.block_n) * splits, x.shape[1], ref_x.shape[1]
    descriptors, ref_descriptors = launch.descriptors(x, weight, tile), launch.descriptors(ref_x, ref_weight, tile)
    if depth == ref_depth and descriptors and ref_descriptors:
        kl_logits_persistent_kernel[(min(programs, launch.processors(x.device)),)](
            *descriptors, part.bias, *ref_descriptors, ref_part.bias, *vectors,
            rows, width, depth, columns[0], *scalars, **constants, FLATTEN=tile.loop == "flat",
        )  # fmt: skip
    else:
        kl_logits_kernel[(programs,)](
            x, weight, part.bias, ref_x, ref_weight, ref_part.bias, *vectors,
            rows, width, depth, ref_depth, columns[0], x.stride(0), weight.stride(0), ref_x.stride(0),
            ref_weight.stride(0), *scalars, **constants, EVEN_H=depth % tile.block_h == ref_depth % tile.block_h == 0,
        )  # fmt: skip
    return parts
