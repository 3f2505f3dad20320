"""The benchmark suite.

    python -m bench run --suite head [--providers ...] [--device cuda] [--out FILE]
    python -m bench compare A.jsonl B.jsonl
    python -m bench report
    python -m bench tune --dtype bfloat16 --H 4096
    python -m bench roofline --N 8192 --H 4096 --V 128256 --gpu h200
    python -m bench certify --budget 420 --out bench/results/NAME     # what matters of a GPU, in seven minutes
    python -m bench wheels                                            # the peers, for a GPU machine without a network

On a CPU every suite but `cpu` runs at toy sizes, which test the harness and measure nothing.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from bench import compare, provenance, report, roofline, tune, wheels
from bench.certify import command as certify
from bench.options import Options, default_reps, default_threads
from bench.records import Record, merged, read, write
from bench.suites import SUITES, suite
from bench.suites.cpu import DTYPES
from bench.tables import results_table


def main(arguments: list[str] | None = None) -> int:
    # to ask whether there is a GPU must not initialise it: `certify` forks
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands.add_parser("run", help="measure", description="\n".join(f"{k}: {v}" for k, v in SUITES.items())))
    modules = {"compare": compare, "report": report, "tune": tune, "roofline": roofline}
    modules |= {"certify": certify, "wheels": wheels}
    for name, module in modules.items():
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args(arguments)
    return args.run(args) or 0


def _add_run(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--providers", nargs="+", default=["*"], metavar="NAME", help="names or patterns: 'liger/*'")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="NAME", help="names or patterns of cases")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU and for accuracy, all for cpu, else float32")
    parser.add_argument("--toy", action=argparse.BooleanOptionalAction, help="default: on a CPU, but for suite cpu")
    parser.add_argument("--reps", type=int, help="default: 20 on a GPU, 5 on a CPU, 3 for toys")
    parser.add_argument("--threads", type=int, default=default_threads(), help="CPU threads")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="suite cpu: a measurement that takes longer per turn is stopped"
    )
    parser.add_argument("--data_dir", type=Path, help="folder with TOFU's JSON lines")
    parser.add_argument("--out", type=Path, help="JSON lines; for a real GPU or CPU result, under bench/results/")
    parser.add_argument("--merge", action="store_true", help="keep what --out has of other cases and providers")
    parser.add_argument("--allow_dirty", action="store_true", help="write --out from files that differ from a commit")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    refused = provenance.refusal(args.allow_dirty) if args.out else None
    if refused:
        print(f"bench: {refused}", file=sys.stderr)
        return 2
    toy = args.device.startswith("cpu") and args.suite != "cpu" if args.toy is None else args.toy
    reps, warmup = default_reps(args.device, toy)
    low_precision = args.device.startswith("cuda") or args.suite == "accuracy"
    options = Options(
        suite=args.suite,
        device=args.device,
        dtype=args.dtype or ("bfloat16" if low_precision else "float32"),
        toy=toy,
        providers=tuple(args.providers),
        cases=tuple(args.case),
        reps=args.reps or reps,
        warmup=warmup,
        threads=args.threads,
        data_dir=args.data_dir,
        seconds=args.seconds,
        **({"dtypes": DTYPES} if args.suite == "cpu" and not args.dtype else {}),
    )
    torch.set_num_threads(args.threads)
    if options.on_gpu:
        torch.cuda.init()
    try:
        options.provider_names  # noqa: B018  # a misspelt name is told before an hour of measuring
        found = _collect(suite(args.suite)(options), args.out, args.merge)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if not found:
        print("bench: no case matched", file=sys.stderr)
        return 2
    return 0


def _collect(records: Iterator[Record], out: Path | None, merge: bool) -> list[Record]:
    """Prints a table and writes what there is after each case, so that an interrupted run keeps what it measured."""
    console = Console()
    before = read(out) if merge and out and out.exists() else []
    found: list[Record] = []
    for _, group in groupby(records, key=lambda r: (r["case"], r["mode"], r["dtype"], r["l2"])):
        of_case = list(group)
        console.print(results_table(of_case))
        found += of_case
        if out:
            write(out, merged(before, found))
    return found


if __name__ == "__main__":
    sys.exit(main())
