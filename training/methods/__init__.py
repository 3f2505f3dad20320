"""The objectives, one record each, in the registry `METHODS`; a file a family."""

from training.methods import likelihood, preference  # noqa: F401  # they register their methods
from training.methods.base import METHODS, Batch, Method, Rows, Settings, method_named, register, register_family

__all__ = ["METHODS", "Batch", "Method", "Rows", "Settings", "method_named", "register", "register_family", "table"]


def table() -> list[tuple[str, str, str]]:
    """(names, formula, source) of the terms that forget, as the documents show them, with all their retain terms."""
    names: dict[tuple[str, str], list[str]] = {}
    for method in METHODS.values():
        names.setdefault((method.formula, method.paper), []).append(method.name)
    return [(", ".join(some), formula, paper) for (formula, paper), some in names.items()]
