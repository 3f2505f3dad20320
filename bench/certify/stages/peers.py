"""Every peer that can be imported, beside ours, at shape R: each is first tried alone, in a unit that may hang or
crash; then the successful ones take turns."""

from functools import partial

from bench.cases import MODES
from bench.certify.journal import PASSED, Journal
from bench.certify.stages.head import PLAIN, batch_of, ours, peak, turns
from bench.certify.unit import Context, Unit
from bench.providers import PROVIDERS

SECONDS = {"full": 24, "frozen": 12, "logprobs": 8}  # for all turns of a mode, if there is that much time
LEAST = 8  # for the warm-up, and one turn each
RESERVE = 30  # that the tries leave to the turns
# These come first, what compiles fast before what does not; the others follow in the order of the table. Seconds of a
# try, as bench/results/h100_1 has them; it has none of flce-none.
FIRST = {
    "trl/chunked": 3,
    "cce/exact": 4,
    "liger/flce-cute": 6,
    "liger/flce-none": 6,
    "liger/scaled": 18,
    "quack/scaled-exp": 26,
}
OTHERS = 6  # seconds, as of the cheaper ones: nothing is known of these
SLOW = ("quack/base-tuned",)  # compiles for minutes: use `python -m bench run`


def peers(toy: bool) -> list[str]:
    names = [name for name in PROVIDERS if not name.startswith(("npo_kernels/", "plain/")) and name not in SLOW]
    return list(dict.fromkeys([*FIRST, *names, *(() if toy else ("plain/compile",))]))


def units(context: Context) -> list[Unit]:
    tries = [
        Unit(f"try {name}", partial(attempt, name), FIRST.get(name, OTHERS), 60, RESERVE) for name in peers(context.toy)
    ]
    return [*tries, *(Unit(f"{mode}, in turns", partial(in_turns, mode), LEAST) for mode in MODES)]


def attempt(name: str, context: Context) -> str:
    """One step, which compiles, and the peak of a second one."""
    try:
        PROVIDERS[name].step(batch_of(context, "full"))
    finally:
        # in the records too: a row with the reason for the missing value
        found = context.emit([peak(context, name)])[0]
    return f"{found['value']:.0f} MiB"


def in_turns(mode: str, context: Context) -> str:
    return turns(context, mode, [*ours(context), *PLAIN[mode], *standing(context)], SECONDS[mode])


def standing(context: Context) -> list[str]:
    """The peers whose try succeeded."""
    ended = Journal(context.out / "journal.jsonl").ended("peers")
    return [name for name in peers(context.toy) if (o := ended.get(f"try {name}")) and o.status == PASSED]
