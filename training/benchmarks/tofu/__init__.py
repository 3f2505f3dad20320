"""TOFU (Maini et al. 2024, arXiv 2401.06121) as a `Benchmark`."""

from training.benchmarks.tofu.benchmark import TOFU

__all__ = ["TOFU"]
