import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_allocations):
    """No test in this folder may read uninitialised memory."""
