"""Values that must not be None."""

from typing import TypeVar

Value = TypeVar("Value")


def require(value: Value | None, what: str) -> Value:
    """Return `value`. ValueError if it is None, because a caller or a preset did not set it."""
    if value is None:
        raise ValueError(f"expected {what}, got None")
    return value
