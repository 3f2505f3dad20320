"""`python -m bench`: the torch path against plain PyTorch, loss and both gradients; results as JSON lines.

python -m bench                                    # the CPU cases, printed
python -m bench --out bench/results/torch_path_cpu.jsonl
python -m bench --case wide --dtype bfloat16 --workspace_mb 64
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import CASES
from bench.measure import Job, interleaved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["wide", "wide-long", "smollm2"], help="shapes")
    parser.add_argument("--providers", nargs="+", default=["npo_kernels/torch", "plain"], help="what to compare")
    parser.add_argument("--dtype", default="float32", help="dtype of hidden states and head")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--workspace_mb", type=float, default=None, help="limit for ours; the library's default if not given"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--reps", type=int, default=5, help="repetitions, after one of warm-up")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    args = parser.parse_args()

    records = []
    for name in args.case:
        jobs = [
            Job(name, provider, args.dtype, args.device, args.workspace_mb, args.threads, args.reps)
            for provider in args.providers
        ]
        for job, measured in interleaved(jobs).items():
            times, peaks = zip(*measured, strict=True)
            records.append(_record(job, "ms", times))
            records.append(_record(job, "peak_mb", peaks))
        _print([record for record in records if record["case"] == name])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        partial.replace(args.out)


def _record(job: Job, metric: str, values: tuple[float, ...]) -> dict:
    case = CASES[job.case]
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {
        "case": job.case, "provider": job.provider, "what": "fwd_bwd", "dtype": job.dtype,
        "N": case.N, "H": case.H, "V": case.V, "B": case.B, "workspace_mb": job.workspace_mb,
        "metric": metric, "value": statistics.median(values), "p20": cuts[0], "p80": cuts[-1], "reps": len(values),
        "exact": True, "computes": "npo", "device": _device(job.device), "threads": job.threads,
        "torch": torch.__version__, "python": platform.python_version(), "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _device(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return models[0].split(":")[1].strip() if models else platform.processor()


def _commit() -> str:
    """The commit measured, with a mark when the tree differs from it; "unknown" outside a checkout."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"


def _print(records: list[dict]) -> None:
    first = records[0]
    table = Table(
        title=f"{first['case']}: N={first['N']} H={first['H']} V={first['V']} B={first['B']} {first['dtype']}"
    )
    for column in ("provider", "metric", "median", "p20", "p80"):
        table.add_column(column, justify="left" if column in ("provider", "metric") else "right")
    for r in records:
        table.add_row(r["provider"], r["metric"], *(f"{r[key]:.0f}" for key in ("value", "p20", "p80")))
    Console().print(table)


if __name__ == "__main__":
    main()
