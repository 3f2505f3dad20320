"""The targets on a CPU, a row for each dtype and shape, computed from the records of `python -m bench run --suite
cpu`."""

from collections.abc import Iterable, Iterator

from bench.records import Record
from bench.suites.cpu import DTYPES, SHAPES
from bench.tables import markdown

OURS, CEILING = "npo_kernels/torch", "plain/products"
PLAIN = ("plain/eager", "plain/rounded")
COMMAND = "`python -m bench run --suite cpu --seconds 12 --reps 3`"
HEADING = [
    "dtype",
    "shape",
    "time: <= 0.8x plain",
    "its products alone",
    "ceiling: >= 80 %",
    "peak memory: below plain",
    "date",
]
NOT_MEASURED = "not measured"


def sections(records: Iterable[Record]) -> Iterator[str]:
    """A table for each CPU, and the targets that were not measured on any."""
    found = [r for r in records if r["suite"] == "cpu" and not r["gpu"] and r["bfloat16"]]
    if not found:
        return
    machine = lambda r: (r["device"], r["threads"], r["bfloat16"], r["cpu_limits"])  # noqa: E731
    for device, threads, bfloat16, limits in sorted(dict.fromkeys(map(machine, found)), key=str):
        of_machine = [r for r in found if machine(r) == (device, threads, bfloat16, limits)]
        products = "native" if bfloat16 == "native" else f"in float32 copies ({bfloat16})"
        with_limits = f", {limits}" if limits else ""
        yield f"## {device}, {threads} threads{with_limits}: bfloat16 products {products}"
        yield table(of_machine)
    if not any(r["bfloat16"] == "native" for r in found):
        yield f"## A CPU with bfloat16 instructions\n\n{NOT_MEASURED}: {COMMAND} on one."
    yield (
        "Time and peak memory (gradients included) of loss and both gradients against plain PyTorch, eager: the better "
        "of its two\nconventions, log-softmax in float32 and in the dtype of the logits; what took too long is a "
        "bound.\nCeiling: the time of the three bare products, of float32 copies where that is faster. Where these "
        "alone take more\nthan 0.8x of plain PyTorch's time, nothing that forms the logits once can meet that target. "
        f"Made by\n{COMMAND};\n`bench/NOTES.md` names the cases that had 25 seconds."
    )


def table(records: list[Record]) -> str:
    rows = []
    for dtype in DTYPES:
        for case in SHAPES:
            here = [r for r in records if r["dtype"] == dtype and r["case"] == case.name]
            ours = value(here, OURS, "ms")
            date = next((r["date"][:10] for r in here if r["provider"] == OURS), "")
            shape = f"N={case.N}, H={case.head.H}, V={case.head.V}"
            ceiling = value(here, CEILING, "ms")
            share = f"{ceiling / ours:.0%}" if ours and ceiling else NOT_MEASURED
            rows.append(
                [
                    dtype,
                    shape,
                    against_plain(here, OURS, "ms", "ms"),
                    against_plain(here, CEILING, "ms", "ms"),
                    share,
                    against_plain(here, OURS, "peak_mb", "MiB"),
                    date,
                ]
            )
    return markdown(HEADING, rows)


def value(records: Iterable[Record], provider: str, metric: str) -> float | None:
    return next((r["value"] for r in records if (r["provider"], r["metric"]) == (provider, metric)), None)


def against_plain(records: list[Record], provider: str, metric: str, unit: str) -> str:
    """The provider's time over that of the better convention. If both were stopped, a bound: over their time limit."""
    ours = value(records, provider, metric)
    theirs = [v for name in PLAIN if (v := value(records, name, metric)) is not None]
    over = [r["over_ms"] for r in records if r["provider"] in PLAIN and r["status"] == "slow" and r["metric"] == metric]
    if ours is None or not (theirs or over):
        return NOT_MEASURED
    if theirs:
        return f"{ours / min(theirs):.2f}x ({ours:.0f} of {min(theirs):.0f} {unit})"
    return f"< {ours / min(over):.2f}x ({ours:.0f} of more than {min(over):.0f} {unit})"
