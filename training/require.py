"""Values that have to be there."""

from typing import TypeVar

Value = TypeVar("Value")


def require(value: Value | None, what: str) -> Value:
    """`value`; ValueError where it is None, because a caller or a preset left it open."""
    if value is None:
        raise ValueError(f"expected {what}, got None")
    return value
