"""impl="triton": the primitives of `npo_kernels.core.backend` on `csrc_triton`; plain products go to cuBLAS.

The same code runs in the Triton interpreter on CPU tensors (TRITON_INTERPRET=1 before the first import), which is how
the tests check every kernel without a GPU. Importing this module imports Triton; nothing else in the package does.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.exp_logits import exp_logits_kernel, exp_logits_persistent_kernel
from csrc_triton.gradient_rows import add_targets_kernel, finish_hidden_grad_kernel, scale_rows_kernel
from csrc_triton.linear_kl import kl_logits_kernel, softmax_sums_kernel
from csrc_triton.row_statistics import reanchor_kernel, row_statistics_kernel
from csrc_triton.sequence_epilogue import ratio_epilogue_kernel, sequence_sums_kernel
from csrc_triton.target_logit import target_logit_kernel
from csrc_triton.tiles import BLOCK_HIDDEN, BLOCK_ROWS, BLOCK_RUN, PAIR_TILES, ROW_WARPS, TILES, Tile
from npo_kernels.backends.tiles import find_tile, tile_row
from npo_kernels.core.formulas import RatioLoss
from npo_kernels.core.lm_head import Head
from npo_kernels.core.plan import Scratch
from npo_kernels.core.softmax_stats import Statistics, anchor_headroom

INTERPRETED = bool(triton.knobs.runtime.interpret)
SORT_BYTES = 48  # a row: the targets and their order, and the sort's own copies


def architecture(device: torch.device) -> str:
    """The architecture whose row of the tile table a device takes."""
    return tile_row(device).architecture


def describe(x: Tensor) -> str:
    """The tile of `exp_logits` for operands like x and where it is from, in one line."""
    if x.device.type == "cpu":
        return "interpreter"
    tile, row = tile_for(x), tile_row(x.device)
    text = f"tile {tile.block_n}x{tile.block_v}x{tile.block_h}, row {row.architecture} of the tile table"
    return f"{text}: {row.note}" if row.note else text


def tile_for(x: Tensor) -> Tile:
    """The tile of `exp_logits` for operands like x."""
    return find_tile(TILES, architecture(x.device), 8 * x.itemsize, x.shape[-1])


def block_v(x: Tensor) -> int:
    """Columns of one partial sum: the width of one split."""
    return tile_for(x).split


def slab_dtype(x: Tensor) -> torch.dtype:
    """What the exponentials are stored in: the dtype of the operands."""
    return x.dtype


def scratch(x: Tensor, rows: int, vocab_size: int, capped: bool) -> Scratch:
    """Partial sums and maxima of the splits, and the sorted targets: a few numbers a row. cuBLAS has a workspace of its
    own, some 32 MiB a process, which is not counted.
    """
    per_row = 12 * triton.cdiv(vocab_size, block_v(x)) + SORT_BYTES
    return Scratch(per_row=per_row, sums=per_row * rows)


def kl_scratch(x: Tensor, head: Head, ref_x: Tensor, ref_head: Head) -> Scratch:
    """Maxima and sums of both models, and the partial sums of KL."""
    per_row = 24 * triton.cdiv(head.weight.shape[0], _pair_tile(x, ref_x).split) + SORT_BYTES
    return Scratch(per_row=per_row, sums=per_row * x.shape[0])


def target_logits(x: Tensor, head: Head, target: Tensor) -> Tensor:
    """(N,) float32 logit of each row's target, the anchor; NaN for a poisoned row."""
    x, weight = _rows_contiguous(x), _rows_contiguous(head.weight)
    z = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        target_logit_kernel[(x.shape[0],)](
            x, weight, head.bias, target, z, weight.shape[0], x.shape[1], x.stride(0), weight.stride(0),
            head.logit_scale, head.softcap or 0.0,
            HAS_BIAS=head.bias is not None, HAS_SOFTCAP=head.softcap is not None,
            BLOCK_H=_hidden_block(x.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip
    return z


def exp_logits(
    x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(slab, partial sums, anchor): the exponentials of a vocabulary slice, their anchor raised where it has to be."""
    slab = aligned_empty(x.shape[0], columns[1] - columns[0], x)
    return slab, *_exponentials(x, head, target, anchor, columns, slab)


def exp_logits_at(x: Tensor, head: Head, target: Tensor, anchor: Tensor, columns: tuple[int, int]) -> Tensor:
    """The slab alone, at an anchor that is high enough: no sums are taken."""
    slab = aligned_empty(x.shape[0], columns[1] - columns[0], x)
    launch_exp_logits(x, head, target, anchor, columns, slab)
    return slab


def partial_sums(x: Tensor, head: Head, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """(partial sums of the whole vocabulary, the anchor they ended with), with nothing of size V written."""
    return _exponentials(x, head, target, anchor, (0, head.weight.shape[0]), slab=None)


def _exponentials(
    x: Tensor,  # (n, H)
    head: Head,  # of the whole vocabulary
    target: Tensor,  # (n,)
    anchor: Tensor,  # (n,) float32
    columns: tuple[int, int],
    slab: Tensor | None,  # written, if given
) -> tuple[Tensor, Tensor]:
    """(partial sums (splits, n), anchor): every tile once, and again those of row blocks whose anchor was raised."""
    rows, tile = x.shape[0], tile_for(x)
    splits = triton.cdiv(columns[1] - columns[0], tile.split)
    parts, maxima = torch.empty(2, splits, rows, dtype=torch.float32, device=x.device)
    launch_exp_logits(x, head, target, anchor, columns, slab, parts, maxima)
    raised = torch.empty_like(anchor)
    row_blocks = triton.cdiv(rows, tile.block_n)
    dirty = torch.empty(row_blocks, dtype=torch.int32, device=x.device)
    if rows:
        reanchor_kernel[(row_blocks,)](
            maxima, anchor, raised, dirty, rows, splits, anchor_headroom(slab_dtype(x)), BLOCK_N=tile.block_n
        )
    launch_exp_logits(x, head, target, raised, columns, slab, parts, dirty=dirty)
    return parts, raised


def resum(x: Tensor, head: Head, target: Tensor, anchor: Tensor, raised: Tensor, parts: Tensor) -> None:
    """Overwrite the partial sums of the rows in `raised` (n,) bool by those at their anchor, in one launch.

    It does the row blocks of `exp_logits` that hold such a row; the others are found unchanged.
    """
    block_n = tile_for(x).block_n
    filled = torch.nn.functional.pad(raised, (0, -raised.shape[0] % block_n))
    dirty = filled.view(-1, block_n).any(1).int()
    launch_exp_logits(x, head, target, anchor, (0, head.weight.shape[0]), None, parts, dirty=dirty)


def launch_exp_logits(
    x: Tensor,
    head: Head,
    target: Tensor,
    anchor: Tensor,
    columns: tuple[int, int],
    slab: Tensor | None = None,  # written if given, as are
    parts: Tensor | None = None,  # (splits, n) and
    maxima: Tensor | None = None,  # (splits, n)
    dirty: Tensor | None = None,  # (row blocks,) int32; if given only these are done
) -> None:
    """One launch, of the kernel that the tile and the strides of the operands say."""
    if not x.shape[0]:
        return
    x, part = _rows_contiguous(x), head.columns(*columns)
    weight = _rows_contiguous(part.weight)
    tile = tile_for(x)
    splits = triton.cdiv(x.shape[0], tile.block_n) * triton.cdiv(weight.shape[0], tile.split)
    vectors = part.bias, target, anchor, dirty, slab, parts, maxima
    sizes = x.shape[0], weight.shape[0], x.shape[1], columns[0]
    scalars = 0 if slab is None else slab.stride(0), head.logit_scale, head.softcap or 0.0
    constants = {
        "HAS_BIAS": part.bias is not None, "HAS_SOFTCAP": head.softcap is not None, "STORE": slab is not None,
        "SUMS": parts is not None, "MAXIMA": maxima is not None, "REPAIR": dirty is not None,
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h, "SPLIT_TILES": tile.split_tiles,
        "GROUP": tile.group, "UPCAST": INTERPRETED and x.dtype == torch.bfloat16, "PRECISION": precision(x),
        "PIECES": tile.pieces, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    if tile.loop and _describable(x) and _describable(weight):
        # a repair skips tiles, and where no sum is stored after a tile Triton before 3.9 fails to merge the loops
        merged = tile.loop != "serial" and dirty is None and parts is not None
        exp_logits_persistent_kernel[(min(splits, processors(x.device)),)](
            TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_h]),
            TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_h]),
            *vectors, *sizes, *scalars, **constants, FLATTEN=merged, SPECIALIZE=merged and tile.loop == "specialized",
        )  # fmt: skip
    else:
        even = x.shape[1] % tile.block_h == 0
        exp_logits_kernel[(splits,)](
            x, weight, *vectors, *sizes, x.stride(0), weight.stride(0), *scalars, **constants, EVEN_H=even
        )


def _pair_tile(x: Tensor, ref_x: Tensor) -> Tile:
    bits, depth = 8 * max(x.itemsize, ref_x.itemsize), max(x.shape[1], ref_x.shape[1])
    return find_tile(PAIR_TILES, architecture(x.device), bits, depth)


def softmax_sums(x: Tensor, head: Head, beside: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, sums of the exponentials below them), (splits, n) float32, of the logits of a whole head.

    `beside`: the rows of the other model, as `kl_logits` will get them, which takes the same tile.
    """
    x, weight = _rows_contiguous(x), _rows_contiguous(head.weight)
    rows, tile = x.shape[0], _pair_tile(x, beside)
    splits = triton.cdiv(weight.shape[0], tile.split)
    maxima, sums = torch.empty(2, splits, rows, dtype=torch.float32, device=x.device)
    if rows:
        softmax_sums_kernel[(triton.cdiv(rows, tile.block_n) * splits,)](
            x, weight, head.bias, maxima, sums, rows, weight.shape[0], x.shape[1], x.stride(0), weight.stride(0),
            head.logit_scale, head.softcap or 0.0, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, EVEN_H=x.shape[1] % tile.block_h == 0,
            BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, SPLIT_TILES=tile.split_tiles,
            GROUP=tile.group, UPCAST=INTERPRETED and x.dtype == torch.bfloat16, PRECISION=precision(x),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return maxima, sums


def kl_logits(
    x: Tensor, head: Head, ref_x: Tensor, ref_head: Head, normalizers: tuple[Tensor, ...], columns: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(slab, partial sums of KL): p - q of a vocabulary slice, times the derivative of the softcap."""
    slab = aligned_empty(x.shape[0], columns[1] - columns[0], x)
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
    x, ref_x = _rows_contiguous(x), _rows_contiguous(ref_x)
    part, ref_part = head.columns(*columns), ref_head.columns(*columns)
    weight, ref_weight = _rows_contiguous(part.weight), _rows_contiguous(ref_part.weight)
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
            GROUP=tile.group, UPCAST=INTERPRETED and torch.bfloat16 in (x.dtype, ref_x.dtype),
            PRECISION=precision(x), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return parts


def row_statistics(parts: Tensor, anchor: Tensor, target_logit: Tensor) -> Statistics:
    """From the partial sums of exponentials (splits, n) and the anchor they were taken at."""
    logp, miss, prob_scale = (torch.empty_like(anchor) for _ in range(3))
    if anchor.shape[0]:
        row_statistics_kernel[_row_grid(anchor.shape[0])](
            parts, anchor, target_logit, logp, miss, prob_scale, anchor.shape[0], parts.shape[0],
            BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
    return Statistics(target_logit, logp, miss, anchor, prob_scale)


def sequence_sums(values: Tensor, sequence: Tensor, starts: Tensor) -> Tensor:
    """(n,) row values -> (B,) sums."""
    logps = torch.empty(starts.shape[0] - 1, dtype=torch.float32, device=values.device)
    if logps.shape[0]:
        sequence_sums_kernel[logps.shape](values, starts, logps, BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS)
    return logps


def ratio_epilogue(
    stats: Statistics, sequence: Tensor, starts: Tensor, ratio: RatioLoss, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps (B,), losses (B,), row_coef (n,), target_coef (n,)) in one launch."""
    logps, losses = torch.empty_like(ratio.offset), torch.empty_like(ratio.offset)
    coefs = torch.zeros(2, stats.logp.shape[0], dtype=torch.float32, device=logps.device)  # 0 for filling rows
    if logps.shape[0]:
        ratio_epilogue_kernel[logps.shape](
            stats.target_logit, stats.logp, stats.miss, stats.prob_scale, starts, ratio.offset, ratio.scale,
            logps, losses, coefs[0], coefs[1], ratio.beta, head.logit_scale, head.softcap or 0.0,
            LENGTH_NORMALIZED=ratio.length_normalized, HAS_SOFTCAP=head.softcap is not None,
            BLOCK_N=BLOCK_ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
    return logps, losses, coefs[0], coefs[1]


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """scale_i * x_i, rounded once to the dtype of x."""
    x = _rows_contiguous(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        block = _hidden_block(x.shape[1])
        scale_rows_kernel[_hidden_grid(x.shape)](
            x, scale, out, x.shape[1], x.stride(0), BLOCK_H=block, num_warps=ROW_WARPS
        )
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
    if product.shape[0]:
        weight = _rows_contiguous(head.weight)
        finish_hidden_grad_kernel[_hidden_grid(product.shape)](
            product, row_coef, target_coef, target, index, weight, out, weight.shape[0], product.shape[1],
            weight.stride(0), BLOCK_H=_hidden_block(product.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip


def group_targets(target: Tensor) -> tuple[Tensor, Tensor]:
    """(targets in ascending order, rows in that order), so that each label is summed by one program."""
    return torch.sort(target, stable=True)


def add_targets(
    grad: Tensor, x: Tensor, coef: Tensor, targets: tuple[Tensor, Tensor], columns: tuple[int, int]
) -> None:
    """grad[y_i - begin] += coef_i x_i in float32 for the rows whose target lies in the slice [begin, end)."""
    if x.shape[0]:
        x = _rows_contiguous(x)
        add_targets_kernel[_hidden_grid(x.shape)](
            grad, x, coef, *targets, x.shape[0], columns[1] - columns[0], x.shape[1], columns[0],
            x.stride(0), grad.stride(0), BLOCK_RUN=BLOCK_RUN, BLOCK_H=_hidden_block(x.shape[1]), num_warps=ROW_WARPS,
        )  # fmt: skip


def aligned_empty(rows: int, width: int, x: Tensor) -> Tensor:
    """A slab whose rows start at multiples of 128 bytes, which the products that read it are fastest with."""
    unit = 128 // slab_dtype(x).itemsize
    return torch.empty(rows, triton.cdiv(width, unit) * unit, dtype=slab_dtype(x), device=x.device)[:, :width]


def _rows_contiguous(t: Tensor) -> Tensor:
    """The kernels take any row stride, but elements of a row side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can be made of it: address and row stride are multiples of 16 bytes, and rows do not
    overlap (an expanded tensor has a stride of 0).
    """
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1]


@cache
def processors(device: torch.device) -> int:
    """Programs of a persistent launch; in the interpreter so few that each has several splits."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def precision(x: Tensor) -> str:
    """How float32 products are done: as PyTorch is told to do them, in whichever of its two ways to say it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _hidden_block(hidden_size: int) -> int:
    fitting: int = triton.next_power_of_2(hidden_size)
    return min(BLOCK_HIDDEN, fitting)


def _hidden_grid(shape: torch.Size) -> tuple[int, int]:
    return shape[0], triton.cdiv(shape[1], _hidden_block(shape[1]))


def _row_grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCK_ROWS),)
