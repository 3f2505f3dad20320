import pytest


@pytest.fixture(autouse=True)
def _small_and_poisoned(poisoned_allocations, small_blocks):
    """Properties are of every cut into blocks, and of written memory alone."""
