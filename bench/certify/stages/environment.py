"""The conditions of the measurements: versions, driver, clocks and power; and two ceilings to compare with."""

import json
import subprocess
import time
from importlib import metadata

import torch

from bench.certify.unit import Context, Unit
from bench.measure import Clock
from bench.records import Record, record, summary, write_text
from npo_kernels.env import report

QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,"
    "clocks_event_reasons.active,ecc.mode.current,memory.used"
)


def units(context: Context) -> list[Unit]:
    return [
        Unit("versions, clocks, power", facts, 1),
        Unit("ceiling of a product", product_ceiling, 1),
        Unit("ceiling of a copy", copy_ceiling, 1),
    ]


def facts(context: Context) -> str:
    """Writes environment.json: everything a reader of the figures may need."""
    found = report()
    if not context.toy:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "L2 MiB": properties.L2_cache_size / 2**20,
            "nvidia-smi": nvidia_smi(),
        }
    found["packages"] = dict(sorted((d.metadata["Name"], d.version) for d in metadata.distributions()))
    write_text(context.out / "environment.json", json.dumps(found, indent=1) + "\n")
    return f"Python {found['python']}, torch {found['torch']}, Triton {found['triton']}, driver {found['gpu driver']}"


def nvidia_smi() -> dict[str, str] | str:
    """The current clocks and power from the driver, or its error."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if run.returncode:
        return (run.stdout + run.stderr).strip()
    return dict(zip(QUERY.split(","), map(str.strip, run.stdout.split(",")), strict=False))


def product_ceiling(context: Context) -> str:
    """TFLOP/s of a square bfloat16 product of random operands: zeros would be faster."""
    size = 64 if context.toy else 8192
    a, b = (torch.randn(size, size, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    rates = [2 * size**3 / ms / 1e9 for ms in times(context, lambda: a @ b)]
    (found,) = context.emit([ceiling(context, f"product {size}", "tflops", rates, size)])
    return f"{found['value']:.0f} TFLOP/s"


def copy_ceiling(context: Context) -> str:
    """GB/s of a copy, read plus written."""
    size = 2**20 if context.toy else 2**32
    source = torch.randint(0, 255, (size,), device=context.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    rates = [2 * size / ms / 1e6 for ms in times(context, lambda: target.copy_(source))]
    (found,) = context.emit([ceiling(context, "copy", "gb_s", rates, size)])
    return f"{found['value']:.0f} GB/s"


def times(context: Context, call) -> list[float]:
    """Milliseconds of 20 calls, after as many as an idle GPU needs to raise its clocks."""
    clock = Clock(context.device)
    found: list[float] = []
    warm = time.monotonic() + (0 if context.toy else 0.5)
    while len(found) < 20:
        clock.wait()
        start = clock.mark()
        call()
        end = clock.mark()
        clock.wait()
        found += [clock.milliseconds(start, end)] if time.monotonic() > warm else []
    return found


def ceiling(context: Context, case: str, metric: str, values: list[float], size: int) -> Record:
    return record(
        context.device, suite="ceilings", case=case, provider="torch", provider_version=torch.__version__, mode="full",
        what="fwd", dtype="bfloat16" if metric == "tflops" else "uint8", N=size, metric=metric, exact=True,
        computes="product" if metric == "tflops" else "copy", **summary(values),
    )  # fmt: skip
