"""The objectives, in the registry `METHODS`: one record each, one file per kind of method.

Every file of this folder is imported, so a new method is a new file and nothing else.
"""

import importlib
import pkgutil

# The methods of the papers register first, in the order of tables and help texts.
# isort: off
from training.methods import likelihood, preference, token_weighted  # noqa: F401
from training.methods import flat_logits, distillation, representation, distribution  # noqa: F401

# isort: on
from training.methods.base import METHODS, Method, Sizes, method_named, register, register_family
from training.methods.rows import Batch, Head, Reference, Rows
from training.methods.settings import Settings

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "Batch",
    "Head",
    "Method",
    "Reference",
    "Rows",
    "Settings",
    "Sizes",
    "method_named",
    "register",
    "register_family",
    "table",
]


def table() -> list[tuple[str, str, str]]:
    """(names, formula, source) of the terms that forget, as the documents show them, with all their retain terms."""
    names: dict[tuple[str, str], list[str]] = {}
    for method in METHODS.values():
        names.setdefault((method.formula, method.source), []).append(method.name)
    return [(", ".join(some), formula, source) for (formula, source), some in names.items()]
