"""A few losses under pytest-benchmark: `pytest bench --benchmark-only`. Not collected by `make test`."""

import pytest
import torch

from bench.cases import HEADS, even
from bench.providers import PROVIDERS, UnsupportedError

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'npo-kernels[bench]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = even("smoke", HEADS["smollm2-135m"] if DEVICE == "cuda" else HEADS["toy"], N=512, B=8)
OURS = "npo_kernels/triton" if DEVICE == "cuda" else "npo_kernels/torch"


@pytest.mark.parametrize("mode", ["full", "frozen", "logprobs"])
@pytest.mark.parametrize("name", [OURS, "plain/eager", "torch/linear_ce-none"])
def test_head(benchmark, name, mode):
    batch = CASE.batch(torch.bfloat16 if DEVICE == "cuda" else torch.float32, DEVICE, mode)

    def step():
        if mode == "logprobs":
            with torch.no_grad():
                result = PROVIDERS[name].run(batch)
        else:
            result = torch.autograd.grad(PROVIDERS[name].run(batch), batch.leaves)[0]
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    try:
        step()
    except UnsupportedError as error:
        pytest.skip(str(error))
    benchmark.group = mode
    assert torch.isfinite(benchmark(step)).all()
