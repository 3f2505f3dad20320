"""Tests of tests/gpu under compute-sanitizer: every access of every thread against the allocations of the device.

In the interpreter tests/bounds.py does the same for the source of a kernel; this checks the compiled code, with for
example pipelined loads. Without PyTorch's cache each tensor is an allocation of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from bench.certify.stages.checks import EVERY_MODE
from bench.certify.unit import Context, Unit
from bench.providers import UnsupportedError

PROGRAM, TOOLKIT = "compute-sanitizer", "/usr/local/cuda"
FOUND = 9  # its exit code if it finds an error
OPTIONS = ("--tool", "memcheck", "--error-exitcode", str(FOUND))
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
OPERATORS = (
    "test_operators.py::test_kl_is_no_worse_than_plain_pytorch[bfloat16-mean]",
    "test_operators.py::test_fakes_have_the_shapes_strides_and_dtypes_of_the_outputs",
)


def units(context: Context) -> list[Unit]:
    if context.toy:
        return [Unit("tests alone", partial(check, tests=["tests/test_tile_table.py"], under=()), 5)]
    named = {"the modes": modes(), "KL and the operators": [f"tests/gpu/{test}" for test in OPERATORS]}
    # a few seconds of tests take about ten times as long, after a slow start
    return [Unit(f"memcheck: {name}", partial(check, tests=tests), 15, 240) for name, tests in named.items()]


def modes() -> list[str]:
    """A test of each mode, with every option of a head on."""
    from tests import matrix

    cases = {case[0]: case for case in matrix.cases() if case[2] == "all" and str(case[1]) == "torch.bfloat16"}
    return [f"tests/gpu/{EVERY_MODE}[{matrix.case_id(case)}-triton]" for case in cases.values()]


def program() -> str:
    """Its location: on the path, or in the toolkit."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in (*homes, TOOLKIT))]
    found = shutil.which(PROGRAM, path=os.pathsep.join(folders))
    if found is None:
        raise UnsupportedError(f"{PROGRAM} is not installed")
    return found


def check(context: Context, tests: Sequence[str], under: Sequence[str] | None = None) -> str:
    """Pytest's counts; raises if the sanitizer found an error or a test failed."""
    under = (program(), *OPTIONS) if under is None else under
    command = [*under, sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env={**os.environ, **UNCACHED}, capture_output=True, text=True)
    print(run.stdout, run.stderr, flush=True)
    return verdict(run.returncode, run.stdout + run.stderr)


def verdict(code: int, printed: str) -> str:
    """Of an exit code and what was printed."""
    if code == FOUND:
        found = re.findall(r"^=+ ((?:Invalid|Program hit|ERROR).*)$", printed, re.MULTILINE)
        raise AssertionError(
            "; ".join(dict.fromkeys(found[:1] + found[-1:])) or f"{PROGRAM} ended with {code}: see log.txt"
        )
    counted = re.findall(r"^(\d+ (?:passed|failed|skipped|error).*?) in ", printed, re.MULTILINE)
    if code != 0 or not counted:
        raise AssertionError(f"{counted[-1] if counted else 'no test ran'}, ended with {code}: see log.txt")
    if "passed" not in counted[-1]:
        raise UnsupportedError(counted[-1])  # skipped tests did not pass
    return counted[-1]
