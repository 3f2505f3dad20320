"""Launches of the kernels on moments of the logits of a row."""

from typing import Any

import torch
import triton
from torch import Tensor

from csrc_triton.row_moments import moment_gradient_kernel, row_moments_kernel
from npo_kernels.backends.triton import launch
from npo_kernels.backends.triton.exp_logits import SORT_BYTES
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.row_moments import GradientRows, Moments


def moment_scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """The moments of the splits, in float32 and, while they are joined, in float64; the sorted targets."""
    per_row = 28 * 6 * triton.cdiv(vocab_size, launch.block_v(x)) + 4 * x.shape[1] + 2 * SORT_BYTES + 200
    return Scratch(per_row=per_row, sums=per_row * rows)


def row_moments(x: Tensor, head: Head, target: Tensor) -> Moments:
    """`Moments` (splits, n) of the whole vocabulary, with nothing of size V written."""
    x, weight = launch.rows_contiguous(x), launch.rows_contiguous(head.weight)
    splits = triton.cdiv(weight.shape[0], launch.tile_for(x).split)
    maximum, total, first, second, logits = torch.empty(5, splits, x.shape[0], dtype=torch.float32, device=x.device)
    argmax = torch.empty(splits, x.shape[0], dtype=torch.int64, device=x.device)
    moments = Moments(maximum, argmax, total, first, second, logits)
    if x.shape[0]:
        row_moments_kernel[_grid(x, weight)](
            x, weight, head.bias, target, *moments, x.shape[0], weight.shape[0], x.shape[1],
            x.stride(0), weight.stride(0), head.logit_scale, head.softcap or 0.0, **_constants(x, head),
        )  # fmt: skip
    return moments


def moment_gradient(x: Tensor, head: Head, target: Tensor, rows: GradientRows, columns: tuple[int, int]) -> Tensor:
    """The slab of a vocabulary slice."""
    slab = launch.aligned_empty(x.shape[0], columns[1] - columns[0], x)
    x, part = launch.rows_contiguous(x), head.columns(*columns)
    weight = launch.rows_contiguous(part.weight)
    if x.shape[0]:
        moment_gradient_kernel[_grid(x, weight)](
            x, weight, part.bias, target, *rows, slab, x.shape[0], weight.shape[0], x.shape[1], columns[0],
            x.stride(0), weight.stride(0), slab.stride(0), head.logit_scale, head.softcap or 0.0, **_constants(x, part),
        )  # fmt: skip
    return slab


def _grid(x: Tensor, weight: Tensor) -> tuple[int]:
    tile = launch.tile_for(x)
    return (triton.cdiv(x.shape[0], tile.block_n) * triton.cdiv(weight.shape[0], tile.split),)


def _constants(x: Tensor, head: Head) -> dict[str, Any]:
    tile = launch.tile_for(x)
    return {
        "HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None,
        "EVEN_H": x.shape[1] % tile.block_h == 0, "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v,
        "BLOCK_H": tile.block_h, "SPLIT_TILES": tile.split_tiles, "GROUP": tile.group,
        "UPCAST": launch.INTERPRETED and x.dtype == torch.bfloat16, "PRECISION": launch.precision(x),
        "PIECES": tile.pieces, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
