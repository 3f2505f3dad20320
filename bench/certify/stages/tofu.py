"""Batches of TOFU at three heads, beside plain PyTorch and what a user has today: TRL's and Liger's losses."""

from functools import partial

from bench.certify.journal import BROKEN, Journal
from bench.certify.stages.head import said
from bench.certify.unit import Context, Unit
from bench.measure import time_case
from bench.suites import tofu
from bench.targets import OURS

USABLE = ("trl/chunked", "liger/dpo", "liger/kto", "liger/scaled", "liger/flce-none")
SECONDS = 7  # of all turns of a head


def units(context: Context) -> list[Unit]:
    cases, _ = tofu.cases(context.options("tofu"))
    return [Unit(case.name, partial(head, number), SECONDS + 3) for number, case in enumerate(cases)]


def head(number: int, context: Context) -> str:
    ended = Journal(context.out / "journal.jsonl").ended("peers")
    broken = {unit.removeprefix("try ") for unit, outcome in ended.items() if outcome.status in BROKEN}
    peers = [name for name in USABLE if name not in broken]
    options = context.options("tofu", providers=(OURS, "plain/eager", *peers), seconds=SECONDS)
    cases, source = tofu.cases(options)
    return said(context.emit(time_case(options, cases[number], note=f"lengths: {source}")), "fwd_bwd")
