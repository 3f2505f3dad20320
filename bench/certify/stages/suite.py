"""All tests that need a GPU, as far as the time allows; the longest come last."""

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench.certify.tests import run_tests
from bench.certify.unit import Context, Unit

LONGEST = ("test_correctness", "test_persistent")
FOLDER = Path(__file__).parents[3] / "tests" / "gpu"
PROCESSES = 8  # that share the GPU: half of their time goes into compiling, on one core of many


def units(context: Context) -> list[Unit]:
    if context.toy:
        return [Unit("tests", partial(run_tests, arguments=["tests/test_tile_table.py", "tests/gpu"]), 5)]
    cores = len(os.sched_getaffinity(0))
    spread = ["-n", str(min(PROCESSES, cores)), "--dist", "worksteal"] if find_spec("xdist") and cores > 1 else []
    files = sorted(path.stem for path in FOLDER.glob("test_*.py"))
    files.sort(key=lambda file: file in LONGEST)
    return [Unit(file, partial(run_tests, arguments=[f"tests/gpu/{file}.py", *spread]), 10, 600) for file in files]
