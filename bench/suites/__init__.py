"""The suites by name: functions from `Options` to records. A suite's module is imported when it is run."""

from collections.abc import Callable, Iterator
from importlib import import_module

from bench.options import Options
from bench.records import Record

SUITES = {
    "head": "the loss alone, at the heads of common models",
    "tofu": "batches of the lengths of TOFU, forget and retain rows in one loss",
    "memory": "peaks in isolated processes",
    "scaling": "time and memory against N, V and sequence length, with fitted exponents",
    "accuracy": "every provider against float64 on random, memorised and forgotten rows",
    "step": "a whole NPO + retain step of a model against one with logits and a live reference",
    "activations": "hidden states of a real model before, during and after unlearning",
    "cpu": "the torch path and the peers that run on a CPU, at the sizes of docs/guides/cpu.md",
}


def suite(name: str) -> Callable[[Options], Iterator[Record]]:
    return import_module(f"bench.suites.{name}").run
