"""Two result files side by side: A, B and B / A of every measurement that both have.

A difference counts if the intervals between the 20 % and 80 % quantiles do not overlap.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.records import KEY, Record, key, read
from bench.tables import number

HELP = "two result files side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="result file, the base")
    parser.add_argument("b", type=Path, metavar="B", help="result file")
    parser.add_argument("--metric", nargs="+", default=["ms", "peak_mb", "rel_err", "tokens_per_s"])


def main(args: argparse.Namespace) -> int:
    pairs = list(common(read(args.a), read(args.b), args.metric))
    if not pairs:
        print(f"bench: no measurement is in both files; they are matched by {', '.join(KEY)}", file=sys.stderr)
        return 1
    table = Table(title=f"A: {args.a.name}, {pairs[0][0]['commit']}; B: {args.b.name}, {pairs[0][1]['commit']}")
    for column in ("case", "provider", "mode", "what", "metric"):
        table.add_column(column)
    for column in ("A", "B", "B / A", ""):
        table.add_column(column, justify="right")
    for a, b in pairs:
        ratio = f"{b['value'] / a['value']:.3f}" if a["value"] else "-"
        names = [a[name] or "" for name in ("case", "provider", "mode", "what", "metric")]
        table.add_row(*names, number(a["value"]), number(b["value"]), ratio, verdict(a, b))
    Console().print(table)
    return 0


def common(first: list[Record], second: list[Record], metrics: list[str]) -> Iterator[tuple[Record, Record]]:
    """Pairs of records of the same thing, both with a value."""
    known = {key(r): r for r in second if r["status"] == "ok"}
    for r in first:
        if r["status"] == "ok" and r["metric"] in metrics and key(r) in known:
            yield r, known[key(r)]


def verdict(a: Record, b: Record) -> str:
    if b["p20"] > a["p80"]:
        return "more"
    return "less" if b["p80"] < a["p20"] else "same"
