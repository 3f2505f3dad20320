"""The options of a run."""

import fnmatch
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cases import Case
from bench.providers import PROVIDERS


@dataclass(frozen=True)
class Options:
    """Of `python -m bench run`. `toy`: sizes that run anywhere in seconds, for testing the harness."""

    suite: str
    device: str = "cpu"
    dtype: str = "float32"
    dtypes: tuple[str, ...] = ()  # for suites that take several; (dtype,) if none are given
    toy: bool = True
    providers: tuple[str, ...] = ("*",)  # names or patterns
    cases: tuple[str, ...] = ("*",)
    reps: int = 3
    warmup: int = 1
    threads: int | None = None
    data_dir: Path | None = None
    # time limit of a case (in isolated processes: of a provider, at least one repetition); a slow one repeats less
    seconds: float = math.inf

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def provider_names(self) -> list[str]:
        """The chosen providers. On a CPU "*" leaves out the Triton kernels, which only the interpreter could run, and
        at toy sizes also torch.compile, which would take longer than all other providers together."""
        if self.providers == ("*",):
            absent = [] if self.on_gpu else ["npo_kernels/triton*"]
            absent += ["plain/compile"] if self.toy else []
            return [name for name in PROVIDERS if not any(fnmatch.fnmatchcase(name, p) for p in absent)]
        unknown = [pattern for pattern in self.providers if not fnmatch.filter(PROVIDERS, pattern)]
        if unknown:
            raise ValueError(f"--providers: unknown provider {unknown[0]!r}; available: {', '.join(PROVIDERS)}")
        return [name for name in PROVIDERS if any(fnmatch.fnmatchcase(name, p) for p in self.providers)]

    def chosen(self, cases: Iterable[Case]) -> list[Case]:
        """Those whose names match --case."""
        return [case for case in cases if any(fnmatch.fnmatchcase(case.name, p) for p in self.cases)]


def default_reps(device: str, toy: bool) -> tuple[int, int]:
    """(repetitions, warm-up turns)."""
    if toy:
        return 3, 1
    return (20, 3) if device.startswith("cuda") else (5, 1)


def default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
