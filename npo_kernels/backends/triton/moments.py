"""Launches of the kernels for the moments of the logits of each row."""

from typing import Any

import torch
from torch import Tensor

from csrc_triton.row_moments import moment_gradient_kernel, row_moments_kernel, row_moments_persistent_kernel
from csrc_triton.tiles import GRADIENT_PIECES, MOMENT_LOOPS, MOMENT_WARPS
from npo_kernels.backends.tiles import find_entry
from npo_kernels.backends.triton import launch
from npo_kernels.backends.triton.exp_logits import SORT_BYTES
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.row_moments import GradientRows, Moments


def moment_scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """The moments of the splits, in float32 and (while they are merged) in float64, and the sorted targets."""
    per_row = 28 * 6 * launch.cdiv(vocab_size, launch.block_v(x)) + 4 * x.shape[1] + 2 * SORT_BYTES + 200
    return Scratch(per_row=per_row, sums=per_row * rows)


def row_moments(x: Tensor, head: Head, target: Tensor) -> Moments:
    """`Moments` (splits, n) of the whole vocabulary; writes nothing of size V."""
    x, weight = launch.rows_contiguous(x), launch.rows_contiguous(head.weight)
    tile = launch.tile_for(x)
    splits = launch.cdiv(weight.shape[0], tile.split)
    maximum, total, first, second, logits = torch.empty(5, splits, x.shape[0], dtype=torch.float32, device=x.device)
    argmax = torch.empty(splits, x.shape[0], dtype=torch.int64, device=x.device)
    moments = Moments(maximum, argmax, total, first, second, logits)
    if not x.shape[0]:
        return moments
    vectors, sizes = (head.bias, target, *moments), (x.shape[0], weight.shape[0], x.shape[1])
    scalars, constants = (head.logit_scale, head.softcap or 0.0), _constants(x, head, tile.pieces)
    loop = moment_loop(x)
    descriptors = launch.descriptors(x, weight, tile._replace(loop=loop))
    if descriptors:
        grid = (min(*_grid(x, weight), launch.processors(x.device)),)
        row_moments_persistent_kernel[grid](
            *descriptors, *vectors, *sizes, *scalars, **constants, FLATTEN=loop == "flat"
        )
    else:
        even = x.shape[1] % tile.block_h == 0
        row_moments_kernel[_grid(x, weight)](
            x, weight, *vectors, *sizes, x.stride(0), weight.stride(0), *scalars, **constants, EVEN_H=even
        )
    return moments


def moment_loop(x: Tensor) -> str:
    """The loop of the persistent kernel; "" if `row_moments_kernel` runs."""
    return find_entry(MOMENT_LOOPS, launch.architecture(x.device), 8 * x.itemsize, x.shape[-1]) or ""


def moment_gradient(
    x: Tensor, head: Head, target: Tensor, rows: GradientRows, columns: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Slab of the gradient of a vocabulary slice (`GradientRows` has the formula)."""
    slab = launch.empty_slab(x, columns) if out is None else out
    x, part = launch.rows_contiguous(x), head.columns(*columns)
    weight, tile = launch.rows_contiguous(part.weight), launch.tile_for(x)
    if x.shape[0]:
        moment_gradient_kernel[_grid(x, weight)](
            x, weight, part.bias, target, *rows, slab, x.shape[0], weight.shape[0], x.shape[1], columns[0],
            x.stride(0), weight.stride(0), slab.stride(0), head.logit_scale, head.softcap or 0.0,
            **_constants(x, part, tile.pieces * GRADIENT_PIECES[8 * x.itemsize]), EVEN_H=x.shape[1] % tile.block_h == 0,
        )  # fmt: skip
    return slab


def _grid(x: Tensor, weight: Tensor) -> tuple[int]:
    tile = launch.tile_for(x)
    return (launch.cdiv(x.shape[0], tile.block_n) * launch.cdiv(weight.shape[0], tile.split),)


def _constants(x: Tensor, head: Head, pieces: int) -> dict[str, Any]:
    tile = launch.tile_for(x)
    return {
        "HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None, "PIECES": pieces,
        "UPCAST": launch.INTERPRETED and x.dtype == torch.bfloat16,
        **launch.tile_constants(tile, x), "num_warps": MOMENT_WARPS,
    }  # fmt: skip
