"""Plain matrix products with float32 results, for operands of any dtype on any device.

| operands, where          | how                                        | summed in | intermediate rounding          |
|--------------------------|--------------------------------------------|-----------|--------------------------------|
| float32                  | as PyTorch does                            | float32   | none                           |
| 16-bit, CUDA             | tensor cores with a float32 result         | float32   | none                           |
| bfloat16, CPU with       | `project`: float32 copies, multiplied with | float32   | none: copies of bfloat16 are   |
| bfloat16 instructions    | bfloat16 instructions                      |           | exact in bfloat16              |
|                          | `matmul`: the operands directly            | float32   | each result once, to bfloat16  |
| 16-bit, elsewhere        | float32 copies                             | float32   | none                           |

`project` computes logits; the statistics need them unrounded. `matmul` computes gradients, which are rounded to 16 bits
in the end anyway: on a CPU with bfloat16 instructions, each of its results is rounded once before it is added in
float32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from npo_kernels.core import cpu

BLOCK_K = 1024  # depth that `matmul` copies to float32 at a time, to bound the memory of the copies
BLOCK_M = 1024  # rows of a 16-bit result of `matmul`
COPY_ELEMENTS = 2**21  # elements of a head that `project` copies to float32 at a time: 8 MiB


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, accumulate: bool = True) -> Tensor:
    """a @ b in float32. If `out` is given, the product is added to it (`accumulate`) or written to it, in place."""
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
    """Bytes of the 16-bit result that a native product needs besides the float32 one."""
    return 2 * min(BLOCK_M, rows) * width if cpu.native(like) else 0


def project(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (n, V) float32 = x (n, H) @ weight (V, H).T; the sums are never rounded to 16 bits."""
    if x.is_cuda and x.dtype != torch.float32:
        out.copy_(matmul(x, weight.t()))
    elif x.dtype == torch.float32:
        with _unrounded(x):
            torch.mm(x, weight.t(), out=out)
    else:
        rows, step = x.float(), max(1, COPY_ELEMENTS // max(1, x.shape[1]))
        for v in range(0, weight.shape[0], step):
            _multiply_copies(rows, weight[v : v + step].float().t(), out[:, v : v + step], cpu.native(x))


def _multiply_copies(a: Tensor, b: Tensor, out: Tensor, native: bool) -> None:
    with cpu.bfloat16_products() if native else _unrounded(a):
        torch.mm(a, b, out=out)


def _unrounded(a: Tensor) -> AbstractContextManager[None]:
    """Context for a float32 product that must not be rounded to bfloat16."""
    return nullcontext() if a.is_cuda else cpu.float32_products()


def project_bytes(x: Tensor, rows: int, columns: int) -> int:
    """Bytes that `project` allocates for float32 copies."""
    if x.is_cuda or x.dtype == torch.float32:
        return 0
    hidden_size = x.shape[1]
    return 4 * (rows * hidden_size + min(max(COPY_ELEMENTS, hidden_size), columns * hidden_size))


def upcast_bytes(like: Tensor, depth: int, width: int) -> int:
    """Bytes of the float32 copies that `matmul` makes of an operand (depth, width), with dtype and device of `like`."""
    return 0 if like.is_cuda or like.dtype == torch.float32 else 4 * min(BLOCK_K, depth) * width
