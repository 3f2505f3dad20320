"""`exp_logits_kernel` and its persistent twin launched by hand, into buffers that show a write outside the outputs."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_triton.exp_logits import exp_logits_kernel, exp_logits_persistent_kernel
from csrc_triton.tiles import ANY_HIDDEN, TILES, Tile
from tests.support import DEVICE

V, H = 300, 36  # ragged against every tile, in rows of whole 16 bytes
TILE = TILES["interpreter", 32, ANY_HIDDEN]
SPLITS = triton.cdiv(V, TILE.split)
SENTINEL = 12345.0


class Outputs:
    """The output of `exp_logits_kernel` for N rows, with guard regions on all sides that must stay unchanged."""

    def __init__(self, N: int):
        self.slab_all = torch.full((N + 5, V + 9), SENTINEL, device=DEVICE)
        self.sums_all = torch.full((SPLITS * N + 20,), SENTINEL, device=DEVICE)
        self.maxima_all = torch.full((SPLITS * N + 20,), SENTINEL, device=DEVICE)
        self.slab = self.slab_all[:N, :V]
        self.sums = self.sums_all[: SPLITS * N].view(SPLITS, N)
        self.maxima = self.maxima_all[: SPLITS * N].view(SPLITS, N)

    def untouched(self, slab: bool = True, sums: bool = True, maxima: bool = True) -> bool:
        """Whether the surroundings are intact, and the outputs that are not wanted as well."""
        N, written = self.slab.shape[0], self.sums.numel()
        intact = [self.slab_all[N:], self.slab_all[:, V:], self.sums_all[written:], self.maxima_all[written:]]
        outputs = ((slab, self.slab), (sums, self.sums), (maxima, self.maxima))
        intact += [out for wanted, out in outputs if not wanted]
        return all((part == SENTINEL).all() for part in intact)


def exp_logits(
    out: Outputs,
    x: Tensor,  # (N, H)
    w: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    anchor: Tensor,  # (N,)
    *,
    begin: int = 0,
    dirty: Tensor | None = None,  # (row blocks,): a repair
    store: bool = True,
    sums: bool = True,
    maxima: bool = True,
    tile: Tile = TILE,
    programs: int = 3,  # of a persistent launch
) -> None:
    N = x.shape[0]
    splits = triton.cdiv(N, tile.block_n) * SPLITS
    vectors = None, target, anchor, dirty, out.slab, out.sums, out.maxima, N, V, H, begin
    scalars = out.slab.stride(0), 1.0, 0.0
    constants = {
        "HAS_BIAS": False, "HAS_SOFTCAP": False, "STORE": store, "SUMS": sums, "MAXIMA": maxima,
        "REPAIR": dirty is not None, "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_H": tile.block_h,
        "SPLIT_TILES": tile.split_tiles, "GROUP": tile.group, "UPCAST": False, "PRECISION": "ieee",
        "PIECES": tile.pieces, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip
    if tile.loop:
        exp_logits_persistent_kernel[(min(programs, splits),)](
            TensorDescriptor.from_tensor(x, [tile.block_n, tile.block_h]),
            TensorDescriptor.from_tensor(w, [tile.block_v, tile.block_h]),
            *vectors, *scalars, **constants, FLATTEN=tile.loop == "flat" and dirty is None and sums, SPECIALIZE=False,
        )  # fmt: skip
    else:
        exp_logits_kernel[(splits,)](
            x, w, *vectors, x.stride(0), w.stride(0), *scalars, **constants, EVEN_H=False, ALIGNED=False
        )  # fmt: skip
