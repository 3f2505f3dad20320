"""Shared by the commands of the papers' experiments: dry run, finding an existing result or running, printing."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.commands.run_folder import RunFolder
from training.store import fingerprint


def carry_out(
    options: Any,  # with the fields fresh, json and dry_run
    path: Path,
    used: dict[str, str],
    run: Callable[[RunFolder], dict[str, Any]],
    table: Callable[[dict[str, Any]], Table],
) -> dict[str, Any] | None:
    """What metrics.json at `path` holds, found there or made by `run`; None after --dry_run.

    `used` are the versions that the result depends on. Prints the table, or under --json `metrics["methods"]`.
    """
    if options.dry_run:
        print(json.dumps(asdict(options), indent=2, default=str))
        return None
    folder = RunFolder(path, options)
    with folder.alone():
        metrics = folder.begin(fingerprint([folder.settings, used]), options.fresh) or run(folder)
    if options.json:
        print(json.dumps(metrics["methods"]))
    else:
        Console().print(table(metrics))
    return metrics
