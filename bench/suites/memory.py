"""Peak memory beyond the inputs, gradients included, in isolated processes, at R and over N."""

from collections.abc import Iterator

from bench.cases import MODES, Case, R, head_case
from bench.memory import isolated
from bench.options import Options
from bench.records import Record

TOKENS = (1024, 2048, 4096, 16384, 32768, 65536)
REPS = 3


def cases(toy: bool) -> list[Case]:
    if toy:
        return [head_case("toy", 64, length=16)]
    return [R, *(head_case("llama-3-8b", N) for N in TOKENS)]


def run(options: Options) -> Iterator[Record]:
    for case in options.chosen(cases(options.toy)):
        modes = MODES if case == R and not options.toy else ("full",)
        yield from isolated(options, [case], modes, reps=1 if options.toy else REPS)
