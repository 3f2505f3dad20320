"""The torch path on a CPU against plain PyTorch and the peers that run there: time and peak memory, isolated.

wide       a large vocabulary on a small model: logits are everything
wide-long  the same in one sequence, which no chunk of whole sequences can hold: the mode with a product more
smollm2    the head of SmolLM2-135M
"""

from collections.abc import Iterator
from dataclasses import replace

from bench.cases import HEADS, Case, Head, even
from bench.memory import isolated
from bench.options import Options
from bench.records import Record

WIDE = Head(64, 128256)
CASES = (
    even("wide", WIDE, N=4096, B=32),
    even("wide-long", WIDE, N=4096, B=1),
    even("smollm2", HEADS["smollm2-135m"], N=1024, B=16),
)
ON_CPU = (
    "npo_kernels/torch",
    "plain/eager",
    "plain/compile",
    "torch/*",
    "liger/scaled",
    "liger/dpo",
    "liger/kto",
    "trl/chunked",
)


def cases(toy: bool) -> list[Case]:
    return [even("toy", HEADS["toy"], N=96, B=4)] if toy else list(CASES)


def run(options: Options) -> Iterator[Record]:
    if options.providers == ("*",):
        options = replace(options, providers=ON_CPU)
    yield from isolated(options, options.chosen(cases(options.toy)), times=True, reps=options.reps)
