"""Tables and figures of all committed results: bench/results/report.md, *.png, the target table bench/RESULTS.md, and
docs/assets/peers.png for the README.

Everything is computed from bench/results/*.jsonl and from the folders that `python -m bench certify` wrote there, for
CPUs and GPUs alike. Nothing is measured here.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from bench import cpu_targets, figures
from bench.records import RESULTS, Record, read, read_all, read_lines, write_text
from bench.tables import UNITS, markdown, number
from bench.targets import TARGETS, Results, Target

HELP = "tables and figures of the committed results"
NOT_MEASURED = "not measured"
HEADLINE = RESULTS.parents[1] / "docs" / "assets" / "peers.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--headline", type=Path, help="the README's figure (by default only of the committed results)")


def main(args: argparse.Namespace) -> int:
    records = read_all(args.results)
    images = figures.draw(records, args.results)
    text = [*sections(records, images), *certified(args.results)]
    write_text(args.results / "report.md", "\n\n".join(text) + "\n")
    # the target table is written next to the folder that it was computed from
    write_text(args.results.parent / "RESULTS.md", targets_page(records))
    path = args.headline or (HEADLINE if args.results.resolve() == RESULTS.resolve() else None)
    if path is not None:
        gpu = figures.headline(records, path)
        print(f"no GPU was measured beside a peer: {path} is unchanged" if gpu is None else f"{gpu}: {path}")
    print(f"{len(records)} records: {args.results / 'report.md'}, {args.results.parent / 'RESULTS.md'}")
    return 0


def certified(folder: Path) -> Iterator[str]:
    """A table of the runs of `python -m bench certify`, with a link to the report of each."""
    rows = []
    for path in sorted(folder.glob("*/journal.jsonl")):
        records = read(path.with_name("records.jsonl")) if path.with_name("records.jsonl").exists() else []
        statuses = [line["status"] for line in read_lines(path) if line["event"] == "end"]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        first = records[0] if records else dict.fromkeys(("device", "commit", "date"), "")
        name = path.parent.name
        rows.append([f"[{name}]({name}/report.md)", first["device"], first["commit"], first["date"][:10], counts])
    if rows:
        yield "## Certified"
        yield markdown(["run", "machine", "commit", "date", "units"], rows)


def sections(records: list[Record], images: dict[str, list[str]]) -> Iterator[str]:
    """report.md: a section for each suite and machine, a table for each case."""
    yield (
        "# Benchmark results\n\nMade by `python -m bench report` from the JSON lines beside and below it. Medians; "
        "lower is better, except for TFLOP/s,\nGB/s and tokens/s. Rows whose `computes` is not npo do less work, or "
        "other work."
    )
    machine = lambda r: (r["suite"], " ".join(filter(None, (r["gpu"] or r["device"], r["cpu_limits"]))))  # noqa: E731
    for (suite, device), group in groupby(sorted(records, key=machine), key=machine):
        of_machine = list(group)
        yield f"## {suite}, {device}"
        yield provenance(of_machine)
        yield from (f"![{suite}]({name})" for name in images.get(suite, ()))
        cases = dict.fromkeys((r["case"], r["mode"], r["dtype"], r["l2"]) for r in of_machine)
        for case, mode, dtype, l2 in cases:
            rows = [r for r in of_machine if (r["case"], r["mode"], r["dtype"], r["l2"]) == (case, mode, dtype, l2)]
            yield case_table(rows)
        yield from failures(of_machine)


def provenance(records: list[Record]) -> str:
    """What all records of a section have in common, and the dates of the first and the last."""
    first = records[0]
    dates = sorted(r["date"][:10] for r in records)
    facts = [f"torch {first['torch']}"]
    facts += [f"{name} {first[name]}" for name in ("triton", "driver") if first[name]]
    facts += [f"{first['threads']} threads"] if first["threads"] else []
    facts += [f"{first['cpu_capability']}, bfloat16 products: {first['bfloat16']}"] if first["bfloat16"] else []
    facts += [first["cpu_limits"]] if first["cpu_limits"] else []
    loads = [r["load"] for r in records if r["load"] is not None]
    if loads:
        facts.append(f"load average {min(loads):g} to {max(loads):g}")
    commits = ", ".join(sorted({str(r["commit"]) for r in records}))
    return f"{', '.join(facts)}; commit {commits}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def case_table(records: list[Record]) -> str:
    """A row for each provider, a column for each measurement. A roofline has many kernels: it has a row for each."""
    first = records[0]
    by_kernel = first["suite"] == "roofline"
    row, column = (row_of_kernel, unit_of) if by_kernel else (row_of_provider, column_of)
    measured = [r for r in records if r["status"] == "ok"]
    columns = list(dict.fromkeys(column(r) for r in measured))
    values: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for r in measured:
        values[row(r)][column(r)] = number(r["value"])
    rows = [[*names, *(found.get(c, "") for c in columns)] for names, found in values.items()]
    shape = ", ".join(f"{axis}={first[axis]}" for axis in "NHVB" if first[axis] is not None)
    l2 = f", {first['l2']} L2" if first["l2"] else ""
    title = f"**{first['case']}** ({first['mode']}, {shape}, {first['dtype']}{l2})"
    if not rows:
        return f"{title}: no provider has a value."
    heading = ["provider", "kernel" if by_kernel else "computes", *columns]
    return title + "\n\n" + markdown(heading, rows, "ll" + "r" * len(columns))


def row_of_provider(r: Record) -> tuple[str, str]:
    return r["provider"], r["computes"] + ("" if r["exact"] else ", inexact")


def row_of_kernel(r: Record) -> tuple[str, str]:
    return r["provider"], r["tensor"]


def column_of(r: Record) -> str:
    return " ".join(filter(None, (r["what"], r["tensor"], unit_of(r))))


def unit_of(r: Record) -> str:
    metric: str = r["metric"]
    return UNITS.get(metric, metric)


def failures(records: Iterable[Record]) -> Iterator[str]:
    """The providers without a value and the reason, each once."""
    reasons = dict.fromkeys((r["provider"], r["status"], r["error"] or "") for r in records if r["status"] != "ok")
    if reasons:
        rows = ([name, status, error.replace("|", "\\|")] for name, status, error in reasons)
        yield markdown(["no value", "status", "why"], rows)


def targets_table(records: list[Record]) -> str:
    """Measurements on a GPU only; targets without one are marked."""
    results = Results(records)
    rows = [[target.what, target.target, *outcome_cells(target, results)] for target in TARGETS]
    return markdown(["what", "target", "measured", "machine", "command", "date"], rows)


def targets_page(records: list[Record]) -> str:
    """RESULTS.md: a table for each GPU, then those of CPUs."""
    gpus = sorted({r["gpu"] for r in records if r["gpu"]})
    tables = [f"## {gpu}\n\n" + targets_table([r for r in records if r["gpu"] == gpu]) for gpu in gpus]
    return (
        "# Targets\n\n"
        "Shape R: N=8192, H=4096, V=128256, bfloat16. A ratio compares the medians of two providers that took "
        "turns in one process on one\nGPU. Made by `python -m bench report` from `bench/results`; an estimate is never "
        "entered as a measurement (`python -m bench\nroofline` prints the model). `python -m bench certify` measures "
        "all of it on the current GPU. Measurements on a CPU are in\n[results/report.md](results/report.md).\n\n"
        + "\n\n".join([*(tables or [targets_table([])]), *cpu_targets.sections(records)])
        + "\n"
    )


def outcome_cells(target: Target, results: Results) -> list[str]:
    command = "; ".join(f"`python -m bench run --suite {suite}`" for suite in target.suites)
    outcome = target.measure(results)
    if outcome is None:
        return [NOT_MEASURED, "no GPU" if not results.records else "", command, ""]
    first = outcome.records[0]
    return [outcome.text, f"{first['gpu']}, driver {first['driver']}", command, first["date"][:10]]
