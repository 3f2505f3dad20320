"""Time and peak memory of a training step, with the fused losses and in plain PyTorch on full logits.

Both ways take the same model, rows, method and optimiser, through `training.trainer`:

- fused: as `training.unlearn` runs it. Reference log-probabilities, or the teacher's hidden states, are cached before
  the first step; only a KL term runs the frozen model.
- plain: float32 logits of the whole batch, log-softmax and gather (`plain.py`), and a live forward of the frozen model
  in every step of a method that has a reference, as the published TOFU and NPO code does it.

A step is forward, backward, clipping and AdamW, on one micro-batch. Rows are padded alike, and those of all kinds share
a forward either way, so that only head, loss and reference differ. Before any time is taken, losses and gradients of
the two are compared on a few rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console

from training.config import Precision
from training.data import Row
from training.methods import Method, method_named
from training.model import pick_device
from training.pretrained.both_ways import Task, Way, checked, timing
from training.store import file_hash, fingerprint, write_json
from training.versions import versions

METHODS = ("ga", "ga_rt", "ga_kl", "npo", "npo_rt", "npo_kl", "simnpo_rt", "dpo_rt", "idk_rt", "ceu_rt", "undial_rt")
WAYS: tuple[Way, ...] = ("fused", "plain")
CHECKED_ROWS = 2  # of each kind, whose gradients are compared


class Case(NamedTuple):
    """One model, and what is measured of it."""

    model: str
    methods: Sequence[str]
    rows: int  # of each kind


CASES = (Case("smollm2-135m", METHODS, 8), Case("gemma3-270m", ("npo_rt", "npo_kl"), 4))


def measure(
    models: Mapping[str, Path],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    out: Path,
    console: Console,
    *,
    cases: Sequence[Case] = CASES,
    template: str = "plain",
    device: str = "auto",
    device_name: str = "",
    precision: Precision = "auto",
    warmup: int = 1,
    timed: int = 2,
) -> dict[str, Any]:
    """The costs of all cases whose model is there, as costs.json at `out` has them.

    Every measurement has a fresh process, one after the other, and is written when it is there. What `out` has of the
    same model, rows, settings, device and versions is not measured again: the same call goes on where another one was
    stopped.

    Args:
        models: name -> folder; cases of other models are left out.
        rows: {"question", "answer"} by kind: "forget", "retain", and "idk", the questions to forget with a refusal
            each. A case takes the first ones.
        out: the file.
        console: gets a line for each measurement.
        template: how a question is put (`training.templates`).
        device: auto, cuda, mps or cpu.
        device_name: for the record; by default that of `device`.
        precision: of forward and backward, as in training.
        warmup, timed: steps; the first ones are not counted.

    Returns:
        {"device", "versions", "checked": [...], "measured": [...]}; an entry of

        checked: {"key", "model", "method", "loss", "gradient"}: how far fused and plain are apart, relative to the
            plain loss and to the norm of its gradient.
        measured: {"key", "model", "method", "way": "fused" or "plain", "vocab_size", "parameters", "batch":
            {"forget_rows", "retain_rows", "tokens", "scored_tokens"}, "tokens_per_second", "step_seconds": [each timed
            step], "peak_gib", "before_gib"}. Tokens are those of all rows of a step, without padding;
            `tokens_per_second` is by the median step. `peak_gib` is the most that was held in the steps, by the
            process on a CPU, by tensors on a GPU; `before_gib` of it was there before the first step: Python, weights,
            and the frozen model where there is one.

    Raises:
        ValueError: too few rows, a method without a plain form, losses or gradients that differ, or a process that
            was ended, as by the system when memory is short.
    """
    record = {"device": device_name or str(pick_device(device)), "versions": versions()}
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    same = {name: found.get(name) for name in record} == record  # what is of another machine does not stand beside it
    entries = {part: list(found.get(part, [])) if same else [] for part in ("checked", "measured")}

    def settle(part: str, name: dict[str, str], key: str, function: Callable[..., dict[str, Any]], *given: Any) -> None:
        """One entry: found, or made and written."""
        if any(entry["key"] == key for entry in entries[part]):
            return
        words = " ".join(name.values())
        console.print(f"Costs, {part}: {words}", highlight=False, soft_wrap=True)
        new = {"key": key, **name, **in_own_process(words, function, *given)}
        entries[part] = [e for e in entries[part] if {k: e[k] for k in name} != name] + [new]
        write_json(out, record | entries)

    for case in cases:
        if case.model not in models:
            continue
        folder = models[case.model]
        weights = weights_hash(folder)
        for method in case.methods:
            mine = first_rows(method_named(method), rows, case.rows)
            threads = torch.get_num_threads()
            task = Task(str(folder), method, mine, template, device, precision, threads, warmup, timed)
            few = replace(task, rows={kind: some[:CHECKED_ROWS] for kind, some in mine.items()})
            name = {"model": case.model, "method": method}
            settled = [asdict(replace(task, folder=weights)), record]
            settle("checked", name, fingerprint(settled), checked, few)
            for way in WAYS:
                settle("measured", name | {"way": way}, fingerprint([*settled, way]), timing, task, way)
    return record | entries


def in_own_process(words: str, function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """`function(*given)` in a fresh process, so that its peak of memory is its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *given).result()
    except BrokenProcessPool:
        raise ValueError(
            f"costs of {words}: expected a process that finishes, and it was ended, as the system does it when memory "
            "is short; free memory, or take fewer rows. What was measured before is kept"
        ) from None


def first_rows(method: Method, rows: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> dict[str, list[Row]]:
    """Of the kinds that a method needs, and of those to forget, which every plan has."""
    found = {}
    for kind in dict.fromkeys(("forget", *method.needs)):
        some = rows.get(kind, [])[:count]
        if len(some) < count:
            raise ValueError(f"costs of {method.name}: expected {count} {kind} rows, got {len(some)}")
        found[kind] = [{name: row[name] for name in ("question", "answer")} for row in some]
    return found


def weights_hash(folder: Path) -> str:
    """sha256 of the files of weights, one after another; they are not loaded."""
    return fingerprint([file_hash(path) for path in sorted(folder.glob("*.safetensors"))])


def table(costs: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(headings, rows) of a record of `measure`: a row for each model and method, None for what was not measured.

    The first two columns are text. Seconds are the median of the timed steps. "times as fast" is fused by plain, "of
    its memory" the fused peak by the plain one.
    """
    headings = [
        *("model", "method", "V", "tokens a step", "fused, s a step", "plain, s a step"),
        *("fused, tokens/s", "plain, tokens/s", "times as fast"),
        *("fused, peak GiB", "plain, peak GiB", "of its memory"),
    ]
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in costs.get("measured", []):
        pairs.setdefault((entry["model"], entry["method"]), {})[entry["way"]] = entry
    rows = []
    for (model, method), ways in pairs.items():
        one = next(iter(ways.values()))
        taken = [median(ways[way]["step_seconds"]) if way in ways else None for way in WAYS]
        speed, peak = (
            [ways[way][what] if way in ways else None for way in WAYS] for what in ("tokens_per_second", "peak_gib")
        )
        start = [model, method_named(method).label, one["vocab_size"], one["batch"]["tokens"]]
        rows.append([*start, *taken, *speed, _ratio(*speed), *peak, _ratio(*peak)])
    return headings, rows


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b
