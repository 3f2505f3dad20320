"""The objectives, one record each, in the registry `METHODS`; a file a family."""

from training.methods import likelihood, preference  # noqa: F401  # they register their methods
from training.methods.base import METHODS, Batch, Method, Rows, Settings, method_named, register, register_family

__all__ = ["METHODS", "Batch", "Method", "Rows", "Settings", "method_named", "register", "register_family", "table"]


def table() -> list[tuple[str, str, str, str]]:
    """(name, formula of what forgets, what keeps the rest, source) of every method, as the documents show it."""
    keeps = {None: "", "nll": "+ NLL of retain rows", "kl": "+ KL to the reference"}
    return [(m.name, m.formula, keeps[m.retain], m.paper) for m in METHODS.values()]
