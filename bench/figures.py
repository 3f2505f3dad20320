"""The figures of the report: time, rate and memory over N or V, error by kind of row; one file a suite and machine."""

import re
from itertools import groupby, product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.records import Record
from bench.tables import UNITS

# Okabe-Ito: told apart by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
PALE = "#dddddd"

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
    """Of the head suite one model; of the scaling suite the sweep of that axis."""
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
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=130)
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


def _bars(axis: Axes, records: list[Record], over: str, providers: list[str]) -> None:
    cases = list(dict.fromkeys(r["case"] for r in records))
    width = 0.8 / len(providers)
    for number, name in enumerate(providers):
        values = {r["case"]: r["value"] for r in records if r["provider"] == name}
        if not values:  # its handle would have a colour that is not its own
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
