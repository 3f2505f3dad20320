"""The loss alone at shape R and at the heads of common models: full, frozen head, log-probabilities only."""

from collections.abc import Iterator

from bench.cases import HEADS, MODES, Case, R, head_case
from bench.measure import time_case
from bench.options import Options
from bench.records import Record

TOKENS = (1024, 4096, 8192, 16384, 65536)


def cases(toy: bool) -> list[Case]:
    if toy:
        return [head_case(model, 64, length=16) for model in ("toy", "toy-softcap")]
    models = [model for model in HEADS if not model.startswith("toy")]
    return [R, *(case for model in models for N in TOKENS if (case := head_case(model, N)) != R)]


def run(options: Options) -> Iterator[Record]:
    for case in options.chosen(cases(options.toy)):
        for mode in MODES:
            yield from time_case(options, case, mode)
        if case == R and options.on_gpu:
            yield from time_case(options, case, l2="cold")
