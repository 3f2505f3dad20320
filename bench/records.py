"""Results: one JSON line for each measurement, with everything needed to repeat it.

    case, provider, provider_version, mode (full, frozen, logprobs), what (fwd, bwd, fwd_bwd, logprobs), dtype, N, H, V,
    B, metric (ms, tflops, peak_mb, rel_err, ...), value, p20, p80, reps, exact, computes (npo, ce, ...), gpu, driver,
    torch, triton, commit, date

`value` is a median. `status` is "ok" or why there is no value: "missing" (not installed), "unsupported" (cannot do the
case), "oom", "failed", "slow" (took more than `over_ms`); `error` has the message. On a CPU `gpu` is null and `device`
names the processor. `computes` beyond npo and ce is a preference loss (dpo, kto) or a bare matrix product (product).
`load` is the load average of the last minute; more than the number of threads of the run means that other programs used
the processor. On a CPU `cpu_capability` is the instruction set that PyTorch dispatches to, `bfloat16` is "native" or
the reason why bfloat16 products are not, and `cpu_limits` has the environment variables that disable instructions.
"""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.provenance import commit
from npo_kernels.core import cpu
from npo_kernels.env import driver_version, installed_version

RESULTS = Path(__file__).parent / "results"

SCHEMA = (
    "case", "provider", "provider_version", "mode", "what", "dtype", "N", "H", "V", "B", "metric", "value", "p20",
    "p80", "reps", "exact", "computes", "gpu", "driver", "torch", "triton", "commit", "date",
)  # fmt: skip
EXTRA = (
    "suite", "status", "error", "device", "threads", "python", "l2", "data", "plan", "tensor", "note", "load",
    "cpu_capability", "bfloat16", "cpu_limits", "over_ms",
)  # fmt: skip
# Two records with the same values of these fields are measurements of the same thing.
KEY = ("suite", "case", "provider", "mode", "what", "dtype", "metric", "l2", "tensor", "device", "cpu_limits")

Record = dict[str, Any]


def summary(values: Sequence[float]) -> Record:
    """Median and the 20 % and 80 % quantiles."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"value": statistics.median(values), "p20": cuts[0], "p80": cuts[-1], "reps": len(values)}


def record(device: str, **fields: Any) -> Record:
    """A complete record of this machine and moment; fields not given are null."""
    unknown = set(fields) - set(SCHEMA) - set(EXTRA)
    if unknown:
        raise ValueError(f"record: unknown fields {sorted(unknown)}; bench/records.py has the schema")
    made = dict.fromkeys((*SCHEMA, *EXTRA)) | {"status": "ok"} | environment(device) | fields
    load = None if made["gpu"] else round(os.getloadavg()[0], 1)
    return made | {"load": load, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


@cache
def environment(device: str) -> Record:
    """The fields that all records of a run share."""
    on_gpu = torch.device(device).type == "cuda"
    on_cpu = {} if on_gpu else cpu_environment()
    return on_cpu | {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
    }


def cpu_environment() -> Record:
    limits = [f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", *cpu.LIMITS) if os.environ.get(name)]
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": cpu.refusal(torch.bfloat16) or "native",
        "cpu_limits": " ".join(limits) or None,
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def key(r: Record) -> tuple:
    """The values of KEY. Old records have kernel names without the suffix `_kernel`; they are of the same kernels."""
    return tuple((r.get(name) or "").removesuffix("_kernel") if name == "tensor" else r.get(name) for name in KEY)


def merged(before: list[Record], found: list[Record]) -> list[Record]:
    """`found`, and the records of `before` that were not measured again."""
    again = {key(r) for r in found}
    return [r for r in before if key(r) not in again] + found


def write(path: Path, records: Iterable[Record]) -> None:
    """Writes under a temporary name first, so that an interrupted run leaves no partial file."""
    write_text(path, "".join(json.dumps(r) + "\n" for r in records))


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line and syncs it to disk before returning: the next measurement may hang or crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. An incomplete last line, whose writer was killed, is skipped."""
    found = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return found


def read(path: Path) -> list[Record]:
    """Records of a file. Fields that an earlier format lacks are null, and the mode is then "full"."""
    defaults = dict.fromkeys((*SCHEMA, *EXTRA)) | {"status": "ok", "mode": "full", "suite": "cpu"}
    return [defaults | line for line in read_lines(path)]


def read_all(folder: Path = RESULTS) -> list[Record]:
    """All results of a folder and of the `python -m bench certify` folders in it. Of repeated measurements only the
    latest."""
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*/records.jsonl")])
    return latest(r for path in paths for r in read(path))


def latest(records: Iterable[Record]) -> list[Record]:
    """Of repeated measurements only the latest."""
    return list({key(r): r for r in sorted(records, key=lambda r: r["date"])}.values())
