"""python -m tests.fuzz: draw calls until the time is up, shrink what fails, and print it so that it can be kept.

The exit status is 1 if a call failed. `make fuzz ARGS="--minutes 60 --impl torch --function npo"`.
"""

import argparse
import os
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports one

import hypothesis

from tests import interpreter, patches
from tests.fuzz.calls import FUNCTIONS, Call, calls, random_call, smaller
from tests.fuzz.check import check

BATCH = {"torch": 100, "triton": 15, "reference": 100}  # calls of one function before the next one has its turn


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    interpreter.adjust()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # numpy's, of overflows
    seeds = random.Random(options.seed)
    print(f"seed {options.seed} (--seed {options.seed} draws the same calls again)", flush=True)
    pairs = [(impl, function) for impl in options.impl for function in options.function]
    done, failed, end = Counter(), [], time.monotonic() + 60 * options.minutes
    with patches.poisoned_allocations(), patches.small_blocks():
        while pairs and time.monotonic() < end:
            for impl, function in list(pairs):
                if time.monotonic() >= end:
                    break
                failure = search(impl, function, options.largest, seeds.getrandbits(64), done, end)
                if failure is not None:
                    pairs.remove((impl, function))  # the next search would end at the same
                    failed.append(report(*failure, impl, options.out))
            print(", ".join(f"{number} {impl}" for impl, number in sorted(done.items())), flush=True)
    print(f"{sum(done.values())} calls, {len(failed)} failures" + (f", in {options.out}" if failed else ""))
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--impl", nargs="+", choices=BATCH, default=[*BATCH])
    parser.add_argument("--function", nargs="+", choices=FUNCTIONS, default=[*FUNCTIONS])
    parser.add_argument("--largest", type=int, default=40, help="positions of a sequence")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="default: a fresh one")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz_failures.txt"))
    return parser.parse_args(arguments)


def search(
    impl: str, function: str, largest: int, seed: int, done: Counter, end: float
) -> tuple[Call, BaseException] | None:
    """The smallest call that fails among a batch of random ones, and how. Every other batch is hypothesis's own."""
    if seed % 2:
        return search_evenly(impl, function, largest, random.Random(seed), done, end)
    last: list[tuple[Call, BaseException]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=BATCH[impl],
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    @hypothesis.given(calls(function, impl, largest))
    def run(call: Call) -> None:
        if not last and time.monotonic() >= end:
            return
        done[impl] += not last
        try:
            check(call, impl)
        except Exception as error:
            last.append((call, error))
            raise

    try:
        run()
    except Exception as error:
        return last[-1] if last else (Call(function=function), error)
    return None


def search_evenly(
    impl: str, function: str, largest: int, rng: random.Random, done: Counter, end: float
) -> tuple[Call, BaseException] | None:
    """The same with large and small calls alike."""

    def fails(call: Call) -> bool:
        return error_of(call, impl) is not None

    for _ in range(BATCH[impl]):
        call = random_call(function, impl, rng.getrandbits(32), largest)
        if time.monotonic() >= end:
            break
        done[impl] += 1
        if fails(call):
            call = smaller(call, fails)
            return call, error_of(call, impl) or AssertionError("not every time")
    return None


def error_of(call: Call, impl: str) -> Exception | None:
    try:
        check(call, impl)
    except Exception as error:
        return error
    return None


def report(call: Call, error: BaseException, impl: str, out: Path) -> str:
    """Printed, and added to a file; the text of the call goes into `kept.py` as it is."""
    text = f"    # {impl}: {type(error).__name__}: {str(error)[:500]}\n    {call},\n"
    print(f"FAILED\n{text}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(text)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
