"""What the launches have in common: the tile, the interpreter, strides, grids."""

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
    """a / b, rounded up. `triton.cdiv` is made for kernels too: a call of it from the host takes longer than the rest of
    a grid.
    """
    return -(-a // b)


def architecture(device: torch.device) -> str:
    """The architecture whose row of the tile table a device takes."""
    return tile_row(device).architecture


def describe(x: Tensor) -> str:
    """The kernel and the tile of `exp_logits` for operands like x, and what says that they are fast, in one line.

    The persistent kernel wants rows that begin at multiples of 16 bytes: here they are taken to be contiguous.
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
    """What the exponentials are stored in: the dtype of the operands."""
    return x.dtype


def empty_slab(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """A slab whose rows start at multiples of 128 bytes, which the products that read it are fastest with."""
    width, unit = columns[1] - columns[0], 128 // slab_dtype(x).itemsize
    padded = cdiv(width, unit) * unit
    return torch.empty(x.shape[0], padded, dtype=slab_dtype(x), device=x.device)[:, :width]


def rows_contiguous(t: Tensor) -> Tensor:
    """The kernels take any row stride, but elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def aligned(*operands: Tensor) -> bool:
    """Whether rows are to be read as if they began at multiples of 16 bytes: they do, and Triton's compiler, which sees
    multiples of 16 only, finds out; or they are so long that offsets within a tile need 64 bits.
    """
    seen = all(n % 16 == 0 for t in operands for n in (t.data_ptr(), t.stride(0), t.shape[1]))
    return seen or any(t.stride(0) >= 2**22 for t in operands)


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can be made of it: address and row stride are multiples of 16 bytes, and rows do not
    overlap (an expanded tensor has a stride of 0).
    """
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1]


def descriptors(x: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """What a persistent kernel reads x (n, H) and the head (V, H) through. None: the simple one does this call."""
    if not (tile.loop and describable(x) and describable(weight)):
        return None
    x_desc = TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_h])
    return x_desc, TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h])


@cache
def processors(device: torch.device) -> int:
    """Programs of a persistent launch; in the interpreter so few that each has several splits."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def precision(x: Tensor) -> str:
    """How float32 products are done: as PyTorch is told to do them, in whichever of its two ways to say it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_constants(tile: Tile, x: Tensor) -> dict[str, Any]:
    """What every product of x with a head takes from its tile."""
    return {
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "SPLIT_TILES": tile.split_tiles,
        "GROUP": tile.group, "PRECISION": precision(x), "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def hidden_block(hidden_size: int) -> int:
    """Elements of a row that a program of the (N, H) kernels takes."""
    return min(BLOCK_HIDDEN, 1 << (hidden_size - 1).bit_length())


def hidden_grid(shape: torch.Size) -> tuple[int, int]:
    """Of the (N, H) kernels: rows x blocks of H."""
    return shape[0], cdiv(shape[1], hidden_block(shape[1]))


def row_grid(rows: int) -> tuple[int]:
    """Of the (N,) kernels: blocks of rows."""
    return (cdiv(rows, BLOCK_ROWS),)
