"""impl="triton" in every mode, in the interpreter, against float64."""

import pytest
import torch

from tests import matrix


@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
def test_triton_is_no_worse_than_plain_pytorch(case, plans, request):
    if case[:3] == ("slab, chunks", torch.float16, "bias"):
        reason = "small coefficients in float16: see test_small_weights_of_float16_sequences_lose_no_more_than_plain"
        request.applymarker(pytest.mark.xfail(reason=reason))
    matrix.check("triton", case, plans)
