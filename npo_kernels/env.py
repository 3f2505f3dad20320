"""`python -m npo_kernels.env [--json]`: versions and devices of this machine, for an issue report.

It needs no GPU, no Triton and no optional package; whatever is missing is reported as missing.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from npo_kernels import __version__
from npo_kernels.backends.choose import resolve_impl
from npo_kernels.core import cpu

# names of distributions, not modules: flash-attn and flash-attn-4 install the same module
PACKAGES = (
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "liger-kernel",
    "flash-attn",
    "flash-attn-4",
    "torchao",
    "bitsandbytes",
    "numpy",
)


def installed_version(distribution: str) -> str | None:
    """The installed version, or None. The package is not imported: a broken one must not break the report."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver, from nvidia-smi because torch does not report it; None if unknown."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def gpus() -> list[str]:
    """One line per device, such as "NVIDIA H200, capability 9.0, 140 GiB"."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        gib = device.total_memory / 2**30
        lines.append(f"{device.name}, capability {device.major}.{device.minor}, {gib:.0f} GiB")
    return lines


def triton_interpreter() -> bool:
    """Whether TRITON_INTERPRET is set, which Triton reads when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def auto_impl() -> tuple[str, str]:
    """(what impl="auto" resolves to on the best device here, why)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    impl = resolve_impl("auto", torch.device(device))
    if device == "cpu":
        return impl, "no CUDA device"
    return impl, "a CUDA device and triton" if impl == "triton" else "triton is not installed"


def report() -> dict[str, object]:
    """The report as plain values that JSON can hold. Absent packages are None."""
    impl, reason = auto_impl()
    return {
        "npo_kernels": __version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "torch": torch.__version__,
        "cuda runtime": torch.version.cuda,
        "rocm runtime": torch.version.hip,
        "gpu driver": driver_version(),
        "gpus": gpus(),
        **{name: installed_version(name) for name in PACKAGES},
        "triton interpreter": triton_interpreter(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 on the cpu": cpu.arithmetic(torch.bfloat16),
        "impl auto": impl,
        "impl auto because": reason,
    }


def as_text(values: dict[str, object]) -> str:
    """One aligned line per entry; one line per element of a list."""
    words: dict[object, str] = {None: "none", True: "on", False: "off"}
    width = max(map(len, values))
    lines = []
    for name, value in values.items():
        elements = value if isinstance(value, list) and value else [value if value != [] else None]
        for element in elements:
            lines.append(f"{name:<{width}}  {words.get(element, element)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the report, as text or with --json."""
    parser = argparse.ArgumentParser(prog="python -m npo_kernels.env", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    values = report()
    print(json.dumps(values, indent=2) if parser.parse_args(arguments).json else as_text(values))


if __name__ == "__main__":
    main()
