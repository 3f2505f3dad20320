"""Certify a GPU: correctness, the target table, tuning, rooflines and whole steps, in a given time.

    python -m bench certify --budget 420 --out DIR        # exits with 1 if something failed, 2 if nothing ran
    python -m bench certify --plan                        # the stages and their times for a budget
    python -m bench certify --rehearse --out DIR          # everything on a CPU, at tiny sizes, with injected faults

If a unit hangs, crashes, accesses illegal memory or needs an absent peer, only that unit's result is lost. Every result
is written to disk immediately:

    report.md         what passed, failed and was not measured; the targets; the figures
    records.jsonl     the measurements, as `python -m bench run` writes them
    journal.jsonl     what ran, how it ended, how long it took
    environment.json  versions, driver, clocks, power
    tune.json         the tiles that were tried, and the lines of the table for those that won
    log.txt           what the processes printed

DIR belongs under bench/results/, in a folder of its own: `python -m bench report` finds it there.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from bench import provenance
from bench.certify import report, schedule
from bench.certify.journal import BROKEN, PASSED, Journal
from bench.certify.runner import run, since_start_of_process
from bench.certify.unit import Context

HELP = "correctness, targets, tuning and rooflines of the GPU at hand, in a given time"
REHEARSAL = 600.0  # seconds, of which a third is used; no stage should fail for lack of time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of this command, start to end; default 420")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; must not have any yet")
    names = ", ".join(stage.name for stage in schedule.STAGES)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STAGE", help=f"run only these stages, with the whole budget: {names}"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="skip these stages")
    parser.add_argument("--data_dir", type=Path, help="folder with TOFU's JSON lines; default: its committed lengths")
    parser.add_argument("--plan", action="store_true", help="print what a budget is spent on, and stop")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes, with injected faults")
    parser.add_argument("--commit", help="the commit of this checkout, if it has no .git")
    parser.add_argument("--allow_dirty", action="store_true", help="measure files that differ from the last commit")


def main(args: argparse.Namespace) -> int:
    spent = since_start_of_process()
    try:
        stages = schedule.chosen(args.only, args.skip)
    except ValueError as error:
        return _refuse(str(error))
    if args.plan:
        context = Context(Path(), args.rehearse, time.monotonic())
        print(schedule.plan(stages, (args.budget,) if args.budget else schedule.BUDGETS, context))
        return 0
    if args.commit:
        os.environ[provenance.VARIABLE] = args.commit
    refused = refusal(args)
    if refused:
        return _refuse(refused)
    budget = args.budget or (REHEARSAL if args.rehearse else schedule.BUDGETS[0])
    deadline = time.monotonic() + budget - spent - (0 if args.rehearse else schedule.RESERVE / 2)
    args.out.mkdir(parents=True, exist_ok=True)
    context = Context(args.out, args.rehearse, deadline, args.data_dir)
    journal = Journal(args.out / "journal.jsonl")
    if args.rehearse:
        from bench.certify import rehearsal

        stages = rehearsal.prepare(stages)
    else:
        os.environ["NPO_GPU_TESTS"] = "1"  # tests/support.py makes its batches on this device
    run(stages, context, journal, _say, lambda: report.write(args.out, stages, journal))
    print(report.write(args.out, stages, journal))
    return exit_code(stages, journal)


def refusal(args: argparse.Namespace) -> str | None:
    """Why a run would give no useful result, and what to do; None if it would."""
    if args.out is None:
        return "--out DIR is needed: results that are nowhere are lost"
    if (args.out / "journal.jsonl").exists():
        return f"{args.out} has results of an earlier run: name another folder"
    if args.rehearse:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here; --rehearse runs all of it on a CPU, --plan prints what a budget is spent on"
    return provenance.refusal(args.allow_dirty)


def exit_code(stages: list[schedule.Stage], journal: Journal) -> int:
    """0 if nothing failed, 1 if something did, 2 if nothing passed."""
    statuses = {outcome.status for stage in stages for outcome in journal.outcomes(stage.name)}
    if PASSED not in statuses:
        return 2
    return 1 if statuses & set(BROKEN) or report.failed_tests(journal) else 0


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def _refuse(why: str) -> int:
    print(f"bench certify: {why}", file=sys.stderr)
    return 2
