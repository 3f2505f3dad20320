"""Warnings about an evaluation that still gives numbers."""

from typing import Any

from rich.console import Console

from training import distributed
from training.benchmarks.base import Benchmark


def tell_warnings(benchmark: Benchmark, measures: Any, retrained: Any = None) -> None:
    """Print them on stderr: about the measures, those of the retrained model, and their comparison."""
    found = benchmark.warnings(measures)
    if retrained is not None:
        found = found + benchmark.warnings(retrained) + benchmark.doubts(measures, retrained)
    if distributed.is_main():
        for text in dict.fromkeys(found):
            Console(stderr=True).print(f"warning: {text}", markup=False, soft_wrap=True)
