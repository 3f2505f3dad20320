"""How records look on the terminal and in Markdown."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from bench.records import Record

UNITS = {
    "ms": "ms",
    "tflops": "TFLOP/s",
    "peak_mb": "MiB",
    "tokens_per_s": "tokens/s",
    "gb_s": "GB/s",
    "idle_us": "idle us",
}

# Providers as the README's figure and docs/benchmarks.md call them, in their order.
NAMES = {
    "npo_kernels/triton": "npo_kernels",
    "npo_kernels/triton/256MiB": "npo_kernels, `workspace_mb=256`",
    "npo_kernels/torch": 'npo_kernels, `impl="torch"`',
    "plain/eager": "plain PyTorch",
    "plain/compile": "plain PyTorch, compiled",
    "plain/live": "plain PyTorch, logits and a live reference model",
    "trl/chunked": "TRL, chunked head",
    "liger/scaled": "Liger, scaled cross-entropy",
    "liger/flce-none": "Liger, fused cross-entropy per token",
    "cce/exact": "Cut Cross Entropy",
}


def results_table(records: Sequence[Record]) -> Table:
    """The table of one case."""
    first = records[0]
    shape = " ".join(f"{axis}={first[axis]}" for axis in "NHVB")
    l2 = f", {first['l2']} L2" if first["l2"] else ""
    table = Table(title=f"{first['suite']}: {first['case']}, {first['mode']}, {shape}, {first['dtype']}{l2}")
    for column in ("provider", "computes", "what", "metric"):
        table.add_column(column, no_wrap=column == "provider")
    for column in ("median", "p20", "p80"):
        table.add_column(column, justify="right")
    for r in records:
        if r["status"] == "ok":
            what = r["what"] + (f" {r['tensor']}" if r["tensor"] else "")
            values = [number(r[name]) for name in ("value", "p20", "p80")]
            table.add_row(r["provider"], r["computes"], what, r["metric"], *values)
    # a line for each reason instead of a row for each provider
    reasons: dict[str, list[str]] = {}
    for r in records:
        if r["status"] != "ok":
            reasons.setdefault(f"{r['status']}: {r['error']}", []).append(r["provider"])
    table.caption = "\n".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items())
    table.caption_justify = "left"
    return table


def number(value: float) -> str:
    """Four significant digits, without exponents between 0.001 and a million."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]], align: str | None = None) -> str:
    """A table; `align` has one letter for each column, l or r."""
    rules = {"l": "---", "r": "---:"}
    lines = [heading, [rules[letter] for letter in align or "l" * len(heading)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
