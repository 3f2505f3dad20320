"""TOFU (Maini et al. 2024, arXiv 2401.06121) behind the seam of the benchmarks."""

from training.benchmarks.tofu.benchmark import TOFU

__all__ = ["TOFU"]
