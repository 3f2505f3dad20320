"""Calls that failed once, as `make fuzz` printed them after shrinking, and what was wrong."""

from tests.fuzz.calls import Call

KEPT: tuple[Call, ...] = ()
