"""Time and memory against N, V and the length of a sequence, and the exponents of the power laws through them.

An exponent is the slope of the least-squares line of log(value) over log(size): 1 is linear, 0 flat. Its standard error
is in `p20` and `p80` (value -/+ one error) and its number of points in `reps`. The fitted memory is the peak
without the gradients, which every method has to store.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from scipy import stats

from bench.cases import HEADS, Case, Head, even
from bench.isolate import MIB
from bench.measure import WHOLE, described, release, time_batch, time_case
from bench.memory import isolated, peak_of
from bench.options import Options
from bench.records import Record, record

FITTED = {"ms": "exponent_ms", "peak_mb": "exponent_mb"}


def sweeps(toy: bool) -> dict[str, dict[int, Case]]:
    """axis -> size -> case; all other sizes are equal."""
    tokens: tuple[int, ...]
    vocabularies: tuple[int, ...]
    lengths: tuple[int, ...]
    if toy:
        head, N, length = HEADS["toy"], 64, 16
        tokens, vocabularies, lengths = (32, 64, 128), (500, 1000, 2000), (8, 16, 32)
    else:
        head, N, length = HEADS["llama-3-8b"], 8192, 256
        tokens = (2048, 4096, 8192, 16384, 32768, 65536)
        vocabularies, lengths = (16384, 32768, 65536, 131072, 262144), (128, 512, 2048, 8192)
    return {
        "N": {n: even(f"N={n}", head, n, n // length) for n in tokens},
        "V": {V: even(f"V={V}", Head(head.H, V), N, N // length) for V in vocabularies},
        "S": {S: even(f"S={S}", head, N, N // S) for S in lengths},
    }


def run(options: Options) -> Iterator[Record]:
    for axis, cases in sweeps(options.toy).items():
        chosen = options.chosen(cases.values())
        found: list[Record] = []
        for case in chosen:
            found += time_case(options, case)
        found += isolated(options, chosen, reps=1)
        yield from found
        yield from fits(options, axis, cases, found)


def in_one_process(options: Options, axis: str) -> Iterator[Record]:
    """One axis in this process, which takes less time: a GPU's allocator counts exactly in any process."""
    cases, found = sweeps(options.toy)[axis], []
    for case in cases.values():
        batch = case.batch(options.torch_dtype, options.device)
        measured = [*time_batch(options, case, batch)]
        measured += [peak_of(options, case, name, batch) for name in options.provider_names]
        yield from measured
        found += measured
        del batch
        release(options.on_gpu)
    yield from fits(options, axis, cases, found)


def fits(options: Options, axis: str, cases: dict[int, Case], found: Iterable[Record]) -> Iterator[Record]:
    """One exponent for each provider and metric that was measured at three sizes or more."""
    sizes = {case.name: size for size, case in cases.items()}
    points = defaultdict(list)
    for r in found:
        if r["status"] == "ok" and r["metric"] in FITTED and r["what"] == WHOLE["full"]:
            value = r["value"]
            if r["metric"] == "peak_mb":
                value -= options.torch_dtype.itemsize * (r["N"] + r["V"]) * r["H"] / MIB
            if value > 0:
                points[r["provider"], r["metric"]].append((sizes[r["case"]], value))
    for (name, metric), values in points.items():
        if len(values) < 3:
            continue
        slope, error = exponent(values)
        largest = max(cases)
        fields = described(options, cases[largest], name, "full") | {"case": f"over {axis}"}
        statistics = {"value": slope, "p20": slope - error, "p80": slope + error, "reps": len(values)}
        note = f"{axis} from {min(cases)} to {largest}"
        yield record(options.device, **fields, what=WHOLE["full"], metric=FITTED[metric], note=note, **statistics)


def exponent(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(slope, its standard error) of log(value) over log(size)."""
    line = stats.linregress(*np.log(np.array(list(points))).T)
    return float(line.slope), float(np.nan_to_num(line.stderr))  # equal values have no correlation: NaN
