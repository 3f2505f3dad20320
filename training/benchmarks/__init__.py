"""The benchmarks: implementations of `base.Benchmark` in the registry `BENCHMARKS`.

Every file and folder beside this one is imported and registers its benchmark, so a new benchmark is a new file and
nothing else. What benchmarks share is imported by those that use it.
"""

import importlib
import pkgutil

from training.benchmarks import authors, muse, tofu, wmdp  # noqa: F401  # first, in the order of help texts
from training.benchmarks.base import BENCHMARKS, Benchmark, Claim, Column, TradeOff, register

SHARED = ("answers", "open_unlearning")  # they load transformers, which a command's --help does without

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in SHARED:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["BENCHMARKS", "Benchmark", "Claim", "Column", "TradeOff", "register"]
