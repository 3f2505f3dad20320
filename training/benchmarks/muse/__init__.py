"""MUSE (Shi et al. 2024, arXiv 2407.06460) as a `Benchmark`."""

from training.benchmarks.muse.benchmark import MUSE

__all__ = ["MUSE"]
