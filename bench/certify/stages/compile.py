"""Compiles the kernels of the later stages in advance, on all cores.

python -m bench.certify.stages.compile [--toy] [--jobs N]    # without a GPU: counts, and compiles for sm_90
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product

import torch

from bench.cases import HEADS, Case
from bench.certify.specializations import Compiled, Compilers, Specialization, collect, collecting, pretend_sm_90
from bench.certify.unit import Context, Unit
from bench.providers import PROVIDERS, UnsupportedError
from bench.providers.ours import provider
from bench.targets import OURS
from npo_kernels import fused_linear_kl
from npo_kernels.call.arguments import Reduction

# The tests' heads: every option off, and every option on.
CHECKED_HEADS = ("plain", "all")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODELS = ("llama-3-8b", "llama-3.2-1b", "llama-2-7b", "smollm2-135m")
# Divisible by 16, which Triton specialises on, and not. The number of rows has no other influence.
LENGTHS = (((2, 16),) * 4, ((3, 17), (0, 9)))
MARGIN = 2.0  # stops this many seconds before the end of the stage
ENOUGH = 600.0  # seconds: a unit that stops by itself is not killed earlier
SMALL_MB = 8.0  # enough for a few rows of every model in vocabulary slices, too little for any other mode

Calls = Iterator[Callable[[], object]]


def units(context: Context) -> list[Unit]:
    if context.toy:
        return [Unit("a few specialisations", few, 20)]
    return [
        # first, so that no turn of a measurement compiles
        Unit("specialisations of the measurements", partial(compile_all, measurements), 8, ENOUGH),
        Unit("specialisations of the checks", partial(compile_all, checks), 8, ENOUGH),
    ]


def compile_all(calls: Callable[[str], Calls], context: Context) -> str:
    """Compile what the calls launch while it is found, and stop before the stage is killed: what is compiled by then
    is in the cache. The processes stay for the next unit.
    """
    if "compilers" not in context.kept:
        context.kept["compilers"] = Compilers()  # forked before the first call initialises the GPU
    compilers, start = context.kept["compilers"], time.monotonic()
    complete = True
    with collecting(compilers.submit) as found:
        for call in calls(context.device):
            if context.left < MARGIN:
                complete = False
                break
            call()
    collected = time.monotonic() - start
    compiled = compilers.finish(max(0.0, context.left - MARGIN))
    seconds = time.monotonic() - start - collected
    return said(list(found), compiled, compilers.jobs, collected, seconds, complete)


def said(
    found: list[Specialization],
    compiled: list[Compiled],
    jobs: int,
    collected: float,
    seconds: float,
    complete: bool = True,  # all calls were made
) -> str:
    """The line of the report."""
    number = Counter(s.kernel for s in found)
    text = ", ".join(f"{n} of {kernel}" for kernel, n in sorted(number.items()))
    done = f"{len(found)}" if len(compiled) == len(found) else f"{len(compiled)} of {len(found)}"
    text = f"{done} specialisations ({text}): found in {collected:.1f} s{'' if complete else ', not all of them'}, "
    text += f"compiled by {jobs} processes {seconds:.1f} s later, {sum(c.seconds for c in compiled):.0f} s of work"
    if not compiled:
        raise RuntimeError(f"nothing compiled in the time: {text}")
    errors = [f"{c.kernel}: {c.error}" for c in compiled if c.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(compiled)} do not compile: {errors[0]}")
    return text


def checks(device: str, **shape) -> Calls:
    """Every mode, dtype and gradient of the tests, at their ragged shape."""
    from tests import matrix
    from tests.gpu.test_correctness import SHAPE

    for case in matrix.cases():
        if case[2] in CHECKED_HEADS:
            yield partial(_checked, case, shape or SHAPE)
    reductions: tuple[Reduction, ...] = ("mean", "none")
    for dtype, reduction in product(DTYPES, reductions):
        yield partial(_kl, dtype, reduction, shape or SHAPE)


def _checked(case, shape: dict) -> None:
    from tests import matrix, support

    name, dtype, head, layout, needs, seed = case
    batch = support.make_batch(dtype, head, layout, seed=seed, **shape)
    mode = matrix.MODES[name]
    objective = mode.objectives[seed % len(mode.objectives)]
    support.evaluate(objective, batch, needs, impl="triton", workspace_mb=mode.workspace_mb(batch, "triton", needs))


def _kl(dtype: torch.dtype, reduction: Reduction, shape: dict) -> None:
    from tests.support import make_batch

    batch = make_batch(dtype, "all", **shape)
    leaves = batch.leaves(("hidden", "weight"))
    kl = fused_linear_kl(
        leaves.hidden,
        leaves.weight,
        batch.hidden,
        batch.weight,
        reduction=reduction,
        logit_scale=0.7,
        softcap=4.0,
        impl="triton",
    )
    torch.autograd.grad(kl.sum(), (leaves.hidden, leaves.weight))


def measurements(device: str, models: tuple[str, ...] = MODELS) -> Calls:
    """Every measured head, kernel and mode, with few rows."""
    settings = [
        PROVIDERS[OURS],
        PROVIDERS[f"{OURS}/persistent"],
        PROVIDERS[f"{OURS}/simple"],
        provider("triton", SMALL_MB),
    ]
    for model, lengths in product(models, LENGTHS):
        case = Case(model, HEADS[model], lengths)
        batch = case.unfilled(torch.bfloat16, device)  # nothing is computed
        for one, mode in product(settings, ("full", "frozen", "logprobs")):
            yield partial(_measured, one, batch.for_mode(mode))


def _measured(one, batch) -> None:
    with suppress(UnsupportedError):  # no persistent kernel here
        one.step(batch)


def few(context: Context) -> str:
    """The rehearsal interprets kernels, which are then not compiled; so in a process of its own, for sm_90."""
    command = [sys.executable, "-m", "bench.certify.stages.compile", "--toy", "--jobs", "1"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or "no output").splitlines()[-1])
    return run.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.certify.stages.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes, and only some of them compiled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    args = parser.parse_args()
    pretend_sm_90()
    compilers, start = Compilers(args.jobs), time.monotonic()
    calls = [measurements("cpu", ("toy",))] if args.toy else [checks("cpu"), measurements("cpu")]
    found = list(dict.fromkeys(s for some in calls for s in collect(some)))
    collected = time.monotonic() - start
    if args.toy:
        found = list({s.kernel: s for s in found if not s.kernel.startswith("exp_logits")}.values())
    compiled = compilers.compile(found)
    print(said(found, compiled, compilers.jobs, collected, time.monotonic() - start - collected))
    compilers.close()


if __name__ == "__main__":
    main()
