"""The plain matrix products of the gradients: float32 sums of operands of any dtype, on any device."""

import torch
from torch import Tensor

# Depth of an upcast block: a whole float32 copy of a 16-bit head would not be bounded.
BLOCK_K = 4096


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32, added to `out` in place where one is given.

    On CUDA 16-bit operands go to the tensor cores with a float32 result. Elsewhere no such product exists, and they
    are upcast along the contracted dimension, a block at a time.
    """
    if a.is_cuda and a.dtype != torch.float32:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    if a.dtype == b.dtype == torch.float32:
        return torch.mm(a, b) if out is None else out.addmm_(a, b)
    if out is None:
        out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for k in range(0, a.shape[1], BLOCK_K):
        out.addmm_(a[:, k : k + BLOCK_K].float(), b[k : k + BLOCK_K].float())
    return out


def upcast_bytes(like: Tensor, depth: int, width: int) -> int:
    """What `matmul` allocates for an operand (depth, width) of the dtype and on the device of `like`."""
    return 0 if like.is_cuda or like.dtype == torch.float32 else 4 * min(BLOCK_K, depth) * width
