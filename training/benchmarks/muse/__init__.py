"""MUSE (Shi et al. 2024, arXiv 2407.06460) behind the seam of the benchmarks."""

from training.benchmarks.muse.benchmark import MUSE

__all__ = ["MUSE"]
