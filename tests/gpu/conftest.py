"""What needs a real GPU: `make gpu-check`, which sets NPO_GPU_TESTS=1: kernels are compiled, not interpreted."""

import pytest
import torch

from tests.support import ON_GPU

REASON = "needs a CUDA device and NPO_GPU_TESTS=1 (make gpu-check)"


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not ON_GPU:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture
def no_host_sync():
    """A call that waits for the device raises."""

    def run(call):
        call()  # compiled and warm first
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run
