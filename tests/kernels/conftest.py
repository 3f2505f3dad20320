import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_allocations):
    """Nothing in this folder may read memory that nobody has written."""
