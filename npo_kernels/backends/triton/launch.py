"""Helpers for all launches: tiles, interpreter, strides, tensor descriptors, grids."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.tiles import BLOCK_HIDDEN, BLOCK_ROWS, MEASURED, TILES, Tile
from npo_kernels.backends.tiles import find_tile, hidden_bucket, tile_row

INTERPRETED = bool(triton.knobs.runtime.interpret)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` also works in kernels, which makes it slow on the host."""
    return -(-a // b)


def architecture(device: torch.device) -> str:
    """The architecture whose row of the tile table the device uses."""
    return tile_row(device).architecture


def describe(x: Tensor) -> str:
    """One line with the kernel and tile of `exp_logits` for operands like x, and whether they were measured.

    The persistent kernel needs rows that start at multiples of 16 bytes; x and the head are assumed to be contiguous.
    """
    if x.device.type == "cpu":
        return "interpreter"
    tile, row, bits = tile_for(x), tile_row(x.device), 8 * x.itemsize
    kernel = "persistent" if tile.loop and x.shape[-1] * x.itemsize % 16 == 0 else "simple"
    known = not row.note and (row.architecture, bits, hidden_bucket(x.shape[-1])) in MEASURED
    text = f"{kernel} kernel, tile {tile.block_n}x{tile.block_v}x{tile.block_h} of row {row.architecture}"
    return f"{text}, measured" if known else f"{text}, not measured on this GPU{row.note and ': '}{row.note}"


def tile_for(x: Tensor) -> Tile:
    """The tile of `exp_logits` for operands like x."""
    return find_tile(TILES, architecture(x.device), 8 * x.itemsize, x.shape[-1])


def block_v(x: Tensor) -> int:
    """Columns of one partial sum: the width of one split."""
    return tile_for(x).split


def slab_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the stored exponentials: that of the operands."""
    return x.dtype


def empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """An uninitialized slab whose rows start at multiples of 128 bytes, which makes the products with it fastest."""
    width, unit = columns[1] - columns[0], 128 // slab_dtype(x).itemsize
    padded = cdiv(width, unit) * unit
    return torch.empty(x.shape[0], padded, dtype=slab_dtype(x), device=x.device)[:, :width]


def rows_contiguous(t: Tensor) -> Tensor:
    """Copy a tensor unless the elements of each row are contiguous; the kernels take any row stride."""
    return t if t.stride(-1) == 1 else t.contiguous()


def aligned(*operands: Tensor) -> bool:
    """Whether `project` is used instead of `project_unaligned`.

    True if Triton's compiler can tell that rows start at multiples of 16 bytes (it knows of an integer only whether it
    is a multiple of 16), or if rows are so long that offsets within a tile need 64 bits.
    """
    seen = all(n % 16 == 0 for t in operands for n in (t.data_ptr(), t.stride(0), t.shape[1]))
    return seen or any(t.stride(0) >= 2**22 for t in operands)


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can describe t: address and row stride are multiples of 16 bytes, and rows do not
    overlap (an expanded tensor has stride 0).
    """
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1]


def descriptors(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Tensor descriptors of x (n, H) and the head (V, H) for a persistent kernel; None if the simple kernel runs."""
    if not (tile.loop and describable(x) and describable(weight)):
        return None
    x_desc = TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_h])
    return x_desc, TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h])


@cache
def processors(device: torch.device) -> int:
    """Number of programs of a persistent launch: the multiprocessors. 3 in the interpreter, so that each gets several
    splits."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def precision(x: Tensor) -> str:
    """Precision of float32 products, as set in PyTorch by either of its two APIs."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_constants(tile: Tile, x: Tensor) -> dict[str, Any]:
    """The compile-time constants that every product of x with a head takes from its tile."""
    return {
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "SPLIT_TILES": tile.split_tiles,
        "GROUP": tile.group, "PRECISION": precision(x), "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def hidden_block(hidden_size: int) -> int:
    """Elements of a row per program of the (N, H) kernels."""
    return min(BLOCK_HIDDEN, 1 << (hidden_size - 1).bit_length())


def hidden_grid(shape: torch.Size) -> tuple[int, int]:
    """Grid of the (N, H) kernels: rows x blocks of H."""
    return shape[0], cdiv(shape[1], hidden_block(shape[1]))


def row_grid(rows: int) -> tuple[int]:
    """Grid of the (N,) kernels: blocks of rows."""
    return (cdiv(rows, BLOCK_ROWS),)
