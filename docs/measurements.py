"""The text of docs/benchmarks.md, from the committed results in bench/results."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.cases import R
from bench.records import RESULTS, Record, read_all
from bench.report import NOT_MEASURED
from bench.tables import NAMES, number
from bench.targets import OURS, TARGETS, Results

PLAIN = "plain/eager"
INTRODUCTION = """\
# Benchmarks

One call is the NPO loss and its gradients, from the last hidden states. Times are medians of providers that
took turns in one process; peak memory is beyond the inputs, gradients included. Where nothing else is said, the
shape is R: {N} scored tokens, hidden size {H}, a vocabulary of {V} (Llama-3-8B), bfloat16."""
END = """\
## Where the numbers come from

- [bench/results/report.md](../bench/results/report.md): every table, with all providers, versions and commits,
  and what failed or was not measured.
- [bench/RESULTS.md](../bench/RESULTS.md): the targets of the design and how far they are met.
- [bench/NOTES.md](../bench/NOTES.md): conditions of the runs.

`make certify` measures the same on the GPU at hand, and `make bench` on a CPU. No other hardware has been
measured."""


def page(results: Path = RESULTS) -> str:
    everything = read_all(results)
    records = [r for r in everything if r["status"] == "ok"]
    gpus = sorted({r["gpu"] for r in records if r["gpu"]})
    shape = dict(zip("NHV", (R.N, R.head.H, R.head.V), strict=True))
    parts = [INTRODUCTION.format(**shape), headline(records, gpus)]
    for gpu in gpus:
        parts += [f"## {gpu}", *of_gpu([r for r in records if r["gpu"] == gpu])]
    parts += of_cpus(everything)
    return "\n\n".join([*parts, END]) + "\n"


def headline(records: Iterable[Record], gpus: Sequence[str]) -> str:
    """Ours over plain PyTorch, a column a GPU."""
    at_r = {"case": R.name, "dtype": "bfloat16"}
    whole = at_r | {"suite": "head", "what": "fwd_bwd", "metric": "ms"}
    step = {"suite": "step", "case": "llama-3.2-1b/step", "metric": "ms"}
    wanted = [
        ("loss and both gradients: time", PLAIN, whole | {"mode": "full"}),
        (
            "loss and both gradients: peak memory",
            PLAIN,
            at_r | {"suite": "memory", "mode": "full", "metric": "peak_mb"},
        ),
        ("frozen head: time", PLAIN, whole | {"mode": "frozen"}),
        ("log-probabilities alone: time", PLAIN, at_r | {"suite": "head", "mode": "logprobs", "metric": "ms"}),
        ("a whole NPO step of Llama-3.2-1B, against logits and a live reference: time", "plain/live", step),
    ]
    rows = []
    for what, peer, fields in wanted:
        pairs = [[value(records, gpu=gpu, provider=name, **fields) for name in (OURS, peer)] for gpu in gpus]
        rows.append([what, *(NOT_MEASURED if None in pair else f"{pair[0] / pair[1]:.2f}x" for pair in pairs)])
    return table(["npo_kernels over plain PyTorch", *gpus], rows, "l" + "r" * len(gpus))


def of_gpu(records: list[Record]) -> Iterator[str]:
    full = [r for r in records if r["case"] == R.name and r["mode"] == "full" and r["dtype"] == "bfloat16"]
    columns = {"time, ms": ("head", "fwd_bwd", "ms"), "peak memory, MiB": ("memory", "fwd_bwd", "peak_mb")}
    yield "Loss and both gradients at R:"
    yield by_provider(full, columns)
    for case in sorted({r["case"] for r in records if r["suite"] == "tofu"}):
        here = [r for r in records if r["case"] == case]
        shape = ", ".join(f"{axis}={here[0][axis]}" for axis in "NHV")
        yield f"A TOFU batch of 32 forget and 32 retain answers at the head of {case.split('/')[0]} ({shape}):"
        yield by_provider(here, {"time, ms": ("tofu", "fwd_bwd", "ms")})
    for case in sorted({r["case"] for r in records if r["suite"] == "step"}):
        here = [r for r in records if r["case"] == case]
        yield f"A whole training step (forget and retain rows) of {case.split('/')[0]}:"
        columns = {"tokens/s": ("step", "fwd_bwd", "tokens_per_s"), "peak memory, MiB": ("step", "fwd_bwd", "peak_mb")}
        yield by_provider(here, columns)
    yield "Targets:"
    outcomes = [(target, target.measure(Results(records))) for target in TARGETS]
    rows = [[target.what, target.target, outcome.text if outcome else NOT_MEASURED] for target, outcome in outcomes]
    yield table(["what", "target", "measured"], rows)


def of_cpus(records: Iterable[Record]) -> Iterator[str]:
    """A table a processor: shapes down, providers across."""
    found = [r for r in records if r["suite"] == "cpu" and not r["gpu"]]
    for device in sorted({r["device"] for r in found}):
        here = [r for r in found if r["device"] == device]
        threads = ", ".join(sorted({str(r["threads"]) for r in here}))
        yield f"## {device}, {threads} threads"
        yield "Time and peak memory of the loss and both gradients; N scored tokens in B sequences:"
        providers = [p for p in NAMES if any(r["provider"] == p and r["status"] == "ok" for r in here)]
        rows = []
        for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in here):
            of_case = [r for r in here if (r["case"], r["dtype"]) == (case, dtype)]
            shape = ", ".join(f"{axis}={of_case[0][axis]}" for axis in "NHVB")
            rows.append([shape, dtype, *(_of_cpu(of_case, provider) for provider in providers)])
        yield table(["shape", "dtype", *(NAMES[p] for p in providers)], rows, "ll" + "r" * len(providers))


def _of_cpu(records: Iterable[Record], provider: str) -> str:
    of_provider = [r for r in records if r["provider"] == provider]
    milliseconds, mib = (value(of_provider, metric=metric) for metric in ("ms", "peak_mb"))
    if milliseconds is not None:
        return f"{milliseconds:.0f} ms, {_cell(mib)} MiB"
    slow = [r["over_ms"] for r in of_provider if r["status"] == "slow"]
    return f"more than {slow[0] / 1000:.0f} s" if slow else NOT_MEASURED


def by_provider(records: Iterable[Record], columns: dict[str, tuple[str, str, str]]) -> str:
    """A row for each provider in NAMES that has a value, the first column's smallest first."""
    rows = []
    for provider, name in NAMES.items():
        cells = [
            value(records, provider=provider, suite=suite, what=what, metric=metric)
            for suite, what, metric in columns.values()
        ]
        if any(cell is not None for cell in cells):
            rows.append((cells[0] if cells[0] is not None else float("inf"), [name, *map(_cell, cells)]))
    return table(["", *columns], [row for _, row in rows], "l" + "r" * len(columns))


def _cell(measured: float | None) -> str:
    return NOT_MEASURED if measured is None else number(measured)


def value(records: Iterable[Record], **fields) -> float | None:
    """Of the record with these fields; that with a hot cache where there are two."""
    found = [
        r
        for r in records
        if r["status"] == "ok" and r["l2"] != "cold" and all(r[name] == wanted for name, wanted in fields.items())
    ]
    return found[0]["value"] if found else None


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(heading), "l")]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, rules, *rows])
