"""WMDP (Li et al. 2024, arXiv 2403.03218) as a `Benchmark`."""

from training.benchmarks.wmdp.benchmark import WMDP

__all__ = ["WMDP"]
