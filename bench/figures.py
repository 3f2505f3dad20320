"""The figures of the report, one file for each suite and machine, and the one of the README.

The report has time, rate and memory over N or V and errors by kind of row; the README has time and memory beside peers.
"""

import re
from itertools import groupby, product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench import tables
from bench.cases import R
from bench.records import Record
from bench.tables import UNITS

# Okabe-Ito, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
PALE = "#dddddd"
# The README's figure: providers that compute NPO exactly.
SHOWN = (
    "npo_kernels/triton", "npo_kernels/triton/256MiB", "plain/eager", "trl/chunked", "liger/scaled", "cce/exact",
)  # fmt: skip

Panel = tuple[str, str, list[Record]]  # title, axis, records


def draw(records: list[Record], folder: Path) -> dict[str, list[str]]:
    """Writes the figures; returns suite -> file names."""
    names: dict[str, list[str]] = {}
    machine = lambda r: (r["suite"], r["gpu"] or r["device"])  # noqa: E731
    usable = sorted((r for r in records if r["status"] == "ok"), key=machine)
    for (suite, device), found in groupby(usable, key=machine):
        panels = panels_of(suite, list(found))
        if panels:
            name = re.sub(r"[^a-z0-9]+", "_", f"{suite} {device}".lower()).strip("_") + ".png"
            _figure(f"{suite}: {device}", panels, folder / name)
            names.setdefault(suite, []).append(name)
    return names


def panels_of(suite: str, records: list[Record]) -> list[Panel]:
    """Curves where a size varies, bars where there are cases."""
    whole = [r for r in records if r["mode"] == "full" and r["what"] == "fwd_bwd" and r["l2"] != "cold"]
    if suite in ("head", "memory", "scaling"):
        panels = []
        for axis in ("N", "V") if suite == "scaling" else ("N",):
            for metric in ("ms", "tflops", "peak_mb"):
                found = [r for r in whole if r["metric"] == metric and _varies(suite, r, axis)]
                if len({r[axis] for r in found}) > 1:
                    panels.append((UNITS[metric], axis, found))
        return panels
    if suite == "accuracy":
        of = {tensor: [r for r in records if r["tensor"] == tensor] for tensor in ("logps", "hidden", "weight")}
        return [(f"error of {tensor}", "case", found) for tensor, found in of.items() if found]
    dtypes = list(dict.fromkeys(r["dtype"] for r in whole))
    panels = []
    for metric, dtype in product(("ms", "tokens_per_s", "peak_mb"), dtypes):
        found = [r for r in whole if (r["metric"], r["dtype"]) == (metric, dtype)]
        if found:
            panels.append((UNITS[metric] if len(dtypes) == 1 else f"{UNITS[metric]}, {dtype}", "case", found))
    return panels


def _varies(suite: str, r: Record, axis: str) -> bool:
    """One model of the head suite; the sweep of that axis in the scaling suite."""
    if suite == "scaling":
        return r["case"].startswith(f"{axis}=")
    return r["case"].startswith(("llama-3-8b/", "toy/"))


def _figure(title: str, panels: list[Panel], path: Path) -> None:
    providers = list(dict.fromkeys(r["provider"] for _, _, found in panels for r in found))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.8 * lines + 0.4), layout="constrained", squeeze=False
    )
    for axis, (label, over, found) in zip(axes.flat, panels, strict=False):
        (_bars if over == "case" else _curves)(axis, found, over, providers)
        axis.set_ylabel(label)
        axis.grid(axis="y", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles = {h.get_label(): h for axis in figure.axes for h in _handles(axis)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    _save(figure, path, dpi=100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, format="png", dpi=dpi)
    plt.close(figure)
    partial.replace(path)


def _handles(axis: Axes) -> list:
    return axis.get_legend_handles_labels()[0]


def _curves(axis: Axes, records: list[Record], over: str, providers: list[str]) -> None:
    for name in providers:
        points = sorted((r[over], r["value"]) for r in records if r["provider"] == name)
        if points:
            number = providers.index(name)
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.6, markersize=4, **_style(number))
    axis.set(xscale="log", yscale="log", xlabel=over)
    sizes = sorted({r[over] for r in records})
    axis.set_xticks(sizes, [thousands(size) for size in sizes])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.number(value)))
    for minor in (axis.xaxis, axis.yaxis):
        minor.set_minor_formatter(NullFormatter())
        minor.set_minor_locator(NullLocator())


def thousands(size: int) -> str:
    """16384 -> "16k"; other sizes in full."""
    return f"{size // 1024}k" if size % 1024 == 0 else str(size)


def _bars(axis: Axes, records: list[Record], over: str, providers: list[str]) -> None:
    cases = list(dict.fromkeys(r["case"] for r in records))
    width = 0.8 / len(providers)
    for number, name in enumerate(providers):
        values = {r["case"]: r["value"] for r in records if r["provider"] == name}
        if not values:  # an empty bar would take a wrong colour in the legend
            continue
        places = [cases.index(case) + (number + 0.5) * width - 0.4 for case in values]
        axis.bar(places, list(values.values()), width, label=name, color=COLOURS[number % len(COLOURS)])
    axis.set_xticks(range(len(cases)), cases, fontsize=8)
    axis.set_yscale("log")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "-" if number < len(COLOURS) else "--",
    }


def headline(records: list[Record], path: Path) -> str | None:
    """The README's figure: time and peak memory of the loss and both gradients at R, one bar per provider.

    It shows the GPU with the most providers that compute NPO exactly and have both measurements. Returns the name of
    the GPU, or None without writing a file if no GPU has two of them.
    """
    at_r = [r for r in records if (r["case"], r["mode"], r["what"], r["status"]) == (R.name, "full", "fwd_bwd", "ok")]
    at_r = [r for r in at_r if r["dtype"] == "bfloat16" and r["provider"] in SHOWN]
    values = {
        gpu: [latest(at_r, gpu, suite, metric) for suite, metric in (("head", "ms"), ("memory", "peak_mb"))]
        for gpu in sorted({r["gpu"] for r in at_r if r["gpu"]})
    }
    both = {gpu: times.keys() & peaks.keys() for gpu, (times, peaks) in values.items()}
    gpu = max(both, key=lambda name: len(both[name]), default=None)
    if gpu is None or len(both[gpu]) < 2:
        return None
    times, peaks = values[gpu]
    names = sorted(both[gpu], key=times.__getitem__, reverse=True)  # the fastest on top
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 2.5), layout="constrained", sharey=True)
    for axis, label, bars in (
        (left, "time, ms", [times[name] for name in names]),
        (right, "peak memory beyond the inputs, GiB", [peaks[name] / 1024 for name in names]),
    ):
        colours = [COLOURS[0] if name.startswith("npo_kernels/") else "#bbbbbb" for name in names]
        drawn = axis.barh([tables.NAMES[name].replace("`", "") for name in names], bars, color=colours, height=0.65)
        axis.bar_label(drawn, [f"{value:.3g}" for value in bars], padding=3, fontsize=9)
        axis.set(xlim=(0, 1.13 * max(bars)), xticks=[])
        axis.set_title(label, fontsize=10, loc="left")
        axis.tick_params(length=0)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    shape = f"{R.N} tokens, hidden size {R.head.H}, vocabulary {R.head.V}"
    figure.supxlabel(f"NPO loss and both gradients: {shape}, bfloat16, {gpu}", fontsize=8.5)
    _save(figure, path, dpi=160)
    return gpu


def latest(records: list[Record], gpu: str, suite: str, metric: str) -> dict[str, float]:
    """{provider: its value in the newest run}."""
    found = [r for r in records if (r["gpu"], r["suite"], r["metric"]) == (gpu, suite, metric) and r["l2"] != "cold"]
    return {r["provider"]: r["value"] for r in sorted(found, key=lambda r: r["date"])}
