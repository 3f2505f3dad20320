"""The plain matrix products: float32 results of operands of any dtype, on any device.

| operands, where          | how                                        | summed in | rounded on the way             |
|--------------------------|--------------------------------------------|-----------|--------------------------------|
| float32                  | as PyTorch does                            | float32   | not                            |
| 16-bit, CUDA             | tensor cores with a float32 result         | float32   | not                            |
| bfloat16, CPU with       | `project`: float32 copies, multiplied as   | float32   | not: the copies are bfloat16's |
| instructions for it      | bfloat16; `matmul`: as they are            | float32   | `project` not, `matmul` once   |
| 16-bit, elsewhere        | float32 copies                             | float32   | not                            |

`project` makes logits, which no statistic takes rounded. `matmul` makes gradients, which are rounded to 16 bits in the
end: on a CPU with bfloat16 instructions each of its results is rounded once before it is added in float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from npo_kernels.core import cpu

BLOCK_K = 1024  # depth of an upcast block: a whole float32 copy of a 16-bit head would not be bounded
BLOCK_M = 1024  # rows of a 16-bit result
COPIED = 2**21  # elements of a head that are upcast at a time: 8 MiB


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, accumulate: bool = True) -> Tensor:
    """a @ b in float32; added to `out` in place where one is given, or written to it."""
    if a.dtype == b.dtype == torch.float32:
        with _unrounded(a):
            if out is not None and accumulate:
                return out.addmm_(a, b)
            return torch.mm(a, b, out=out)
    if a.is_cuda:
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(out if accumulate else out.zero_(), a, b, out_dtype=torch.float32, out=out)
    if out is None:
        out, accumulate = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device), False
    if a.dtype == b.dtype and cpu.native(a):
        for i in range(0, a.shape[0], BLOCK_M):
            rows = slice(i, i + BLOCK_M)
            if accumulate:
                out[rows] += torch.mm(a[rows], b)
            else:
                out[rows] = torch.mm(a[rows], b)
        return out
    for k in range(0, max(1, a.shape[1]), BLOCK_K):
        depth = slice(k, k + BLOCK_K)
        matmul(a[:, depth].float(), b[depth].float(), out, accumulate or k > 0)
    return out


def result_bytes(like: Tensor, rows: int, width: int) -> int:
    """The 16-bit result, beside the float32 one, of a native product."""
    return 2 * min(BLOCK_M, rows) * width if cpu.native(like) else 0


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, V) float32 = x (n, H) @ weight (V, H).T, the sums never rounded to 16 bits."""
    if x.is_cuda and x.dtype != torch.float32:
        out.copy_(matmul(x, weight.t()))
    elif x.dtype == torch.float32:
        with _unrounded(x):
            torch.mm(x, weight.t(), out=out)
    else:
        rows, step = x.float(), max(1, COPIED // max(1, x.shape[1]))
        for v in range(0, weight.shape[0], step):
            _multiply_copies(rows, weight[v : v + step].float().t(), out[:, v : v + step], cpu.native(x))


def _multiply_copies(a: Tensor, b: Tensor, out: Tensor, native: bool) -> None:
    with cpu.bfloat16_products() if native else _unrounded(a):
        torch.mm(a, b, out=out)


def _unrounded(a: Tensor) -> AbstractContextManager[None]:
    """Around a float32 product."""
    return nullcontext() if a.is_cuda else cpu.float32_products()


def project_bytes(x: Tensor, rows: int, columns: int) -> int:
    """What `project` allocates for rows like those of x: copies."""
    if x.is_cuda or x.dtype == torch.float32:
        return 0
    hidden_size = x.shape[1]
    return 4 * (rows * hidden_size + min(max(COPIED, hidden_size), columns * hidden_size))


def upcast_bytes(like: Tensor, depth: int, width: int) -> int:
    """The copies that `matmul` makes of an operand (depth, width) of the dtype and on the device of `like`."""
    return 0 if like.is_cuda or like.dtype == torch.float32 else 4 * min(BLOCK_K, depth) * width
