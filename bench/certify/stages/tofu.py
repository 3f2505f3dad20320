"""Batches of TOFU at three heads, beside plain PyTorch and the losses of TRL and Liger."""

from functools import partial

from bench.certify.journal import BROKEN, Journal
from bench.certify.stages.head import said
from bench.certify.unit import Context, Unit
from bench.measure import time_case
from bench.suites import tofu
from bench.targets import OURS

USABLE = ("plain/eager", "trl/chunked", "liger/scaled", "liger/flce-none")
# These run torch.compile on themselves, which can take longer than a unit may: they come last, apart from the others.
PREFERENCE = ("liger/dpo", "liger/kto")
SECONDS = 5  # for all turns of a head


def units(context: Context) -> list[Unit]:
    cases, _ = tofu.cases(context.options("tofu"))
    return [
        Unit(f"{case.name}{name}", partial(head, number, peers), seconds)
        for name, peers, seconds in (("", USABLE, SECONDS + 3), (", preference losses", PREFERENCE, 15))
        for number, case in enumerate(cases)
    ]


def head(number: int, peers: tuple[str, ...], context: Context) -> str:
    ended = Journal(context.out / "journal.jsonl").ended("peers")
    broken = {unit.removeprefix("try ") for unit, outcome in ended.items() if outcome.status in BROKEN}
    names = (OURS, *(name for name in peers if name not in broken))
    options = context.options("tofu", providers=names, seconds=SECONDS)
    cases, source = tofu.cases(options)
    return said(context.emit(time_case(options, cases[number], note=f"lengths: {source}")), "fwd_bwd")
