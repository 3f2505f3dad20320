"""The benchmarks: implementations of `base.Benchmark` in the registry `BENCHMARKS`."""

from training.benchmarks import authors, muse, tofu, wmdp  # noqa: F401  # they register themselves
from training.benchmarks.base import BENCHMARKS, Benchmark, Claim, Column, TradeOff, register

__all__ = ["BENCHMARKS", "Benchmark", "Claim", "Column", "TradeOff", "register"]
