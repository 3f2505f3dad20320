"""`exp_logits` launched by hand, into buffers that show every write outside the outputs."""

import torch
import triton
from torch import Tensor

from csrc_triton import exp_logits as kernels
from csrc_triton.tiles import ANY_HIDDEN, TILES, Tile
from tests.support import DEVICE

V, H = 300, 33  # ragged against every tile
TILE = TILES["interpreter", 32, ANY_HIDDEN]
SPLITS = triton.cdiv(V, TILE.split)
SENTINEL = 12345.0


class Outputs:
    """What `exp_logits` writes for N rows, with room on all sides that nobody may touch."""

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
) -> None:
    kernels.exp_logits[(triton.cdiv(x.shape[0], tile.block_n) * SPLITS,)](
        x, w, None, target, anchor, dirty, out.slab, out.sums, out.maxima, x.shape[0], V, H, begin,
        x.stride(0), w.stride(0), out.slab.stride(0), 1.0, 0.0,
        HAS_BIAS=False, HAS_SOFTCAP=False, STORE=store, SUMS=sums, MAXIMA=maxima, REPAIR=dirty is not None,
        EVEN_H=False, BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h,
        SPLIT_TILES=tile.split_tiles, GROUP=tile.group, UPCAST=False, PRECISION="ieee",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
