"""`core/matmul.py` where cuBLAS does it: float32 results of 16-bit operands, of any width, at any place, in place."""

from itertools import product

import pytest
import torch

from npo_kernels.backends.triton.launch import empty_slab
from npo_kernels.core.matmul import matmul
from tests.support import DTYPES, name_of, relative_error

# more than tensor cores lose in 8192 sums, and far less than rounding the result to 16 bits would cost
ALLOWED = 2**-14


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 127, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_products_with_exponentials(dtype, rows, accumulate):
    """As the modes have them: a slice of a slab, and its transpose."""
    g = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=g)

    for width, H in product((1, 809, 8192), (1, 8, 65, 264)):
        slab = empty_slab(draw(rows, 1).to(dtype), (0, 1024 + width))[:, 1024:]
        slab.copy_(draw(rows, width).exp())
        for a, b in ((slab, draw(width, H).to(dtype)), (slab.t(), draw(rows, H).to(dtype))):
            out = draw(a.shape[0], H) if accumulate else None
            exact = a.double() @ b.double() + (out.double() if accumulate else 0)
            found = matmul(a, b, out=out)
            assert found.dtype == torch.float32 and (out is None or found is out)
            assert relative_error(found, exact) < ALLOWED, (a.shape, b.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_products_of_nothing(dtype):
    empty, rows = torch.empty(0, 40, device="cuda", dtype=dtype), torch.empty(0, 24, device="cuda", dtype=dtype)
    assert matmul(empty, torch.ones(40, 24, device="cuda", dtype=dtype)).shape == (0, 24)
    assert (matmul(empty.t(), rows) == 0).all()
    out = torch.ones(40, 24, device="cuda")
    assert (matmul(empty.t(), rows, out=out) == 1).all()
