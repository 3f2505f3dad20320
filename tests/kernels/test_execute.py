"""impl="triton" in every mode, in the interpreter, against float64."""

import pytest

from tests import matrix


@pytest.mark.parametrize("case", matrix.cases(), ids=matrix.case_id)
def test_triton_is_no_worse_than_plain_pytorch(case, plans):
    matrix.check("triton", case, plans)
