"""The style of all figures, and the figures of unlearning: over the epochs, and forgetting against utility.

Colours and line styles of methods are those of their records (`training.methods`), from the palette of Okabe and Ito,
which colour-blind readers tell apart; panels are those of a benchmark's columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from training.benchmarks.base import Column, TradeOff
from training.histories import Histories, History, over_seeds
from training.methods import METHODS
from training.store import renamed_when_done

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of what is no method
LineStyle = Literal["-", "--", "-.", ":"]
INK, PALE, DOTTED = "#222222", "#dddddd", (0, (1, 2))
FLOOR = 1e-30  # below this a p-value is drawn on the edge
GOOD_P = 0.05


@contextmanager
def drawn(
    path: Path, title: str = "", rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4), **subplots: Any
) -> Iterator[np.ndarray]:
    """The axes of a figure, (rows, columns), that is written to `path` at the end."""
    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **subplots)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        yield axes
        for axis in axes.flat:
            axis.grid(color=PALE, linewidth=0.7)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        with renamed_when_done(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
        plt.close(figure)


def panels_of(columns: Mapping[str, Column], histories: Sequence[History]) -> dict[str, Column]:
    """Those that are drawn, and were measured."""
    entries = [entry for history in histories for entry in history]
    return {k: c for k, c in columns.items() if c.panel and all(entry.get(k) is not None for entry in entries)}


def plot_over_epochs(
    histories: Histories,
    columns: Mapping[str, Column],
    title: str,
    path: Path,
    retrained: Mapping[str, Any] | None = None,
) -> None:
    """A panel for each number: medians over the seeds, and their range as a band; dotted: the retrained model."""
    panels = panels_of(columns, [history for runs in histories.values() for history in runs])
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with drawn(path, title, down, across, (4.8 * across + 0.2, 3.7 * down + 0.4), sharex=True) as axes:
        for axis, (key, column) in zip(axes.flat, panels.items(), strict=False):
            last = []
            for name, runs in histories.items():
                epochs, values = over_seeds(runs, "epoch")[0], over_seeds(runs, key)
                values = values.clip(FLOOR) if column.p_value else values
                middle = np.median(values, axis=0)
                axis.plot(epochs, middle, marker="o", markersize=4, **style(name))
                band = {"color": style(name)["color"], "alpha": 0.12, "linewidth": 0}
                axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), **band)
                last.append((middle[-1], epochs[-1], style(name)["color"]))
            _panel(axis, column, retrained.get(key) if retrained else None)
            if len(histories) <= 3 and not column.p_value:
                _end_values(axis, last)
        for axis in axes[-1]:
            axis.set(xlabel="unlearning epoch")
            axis.locator_params(axis="x", integer=True)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        _legend(axes, outside=len(histories) > 3)


def plot_trade_off(
    histories: Histories, keys: TradeOff, columns: Mapping[str, Column], title: str, path: Path,
    start: Mapping[str, Any], retrained: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Medians over seeds; markers grow with the epochs. The retrained model is the star, where forgetting would end."""
    with drawn(path, title, size=(7.6, max(5.0, 0.24 * len(histories) + 0.8))) as axes:  # with room for the legend
        axis = axes[0, 0]
        for name, runs in histories.items():
            x, y = (np.median(over_seeds(runs, key), axis=0) for key in keys)
            y = y.clip(FLOOR) if columns[keys.forgetting].p_value else y
            axis.plot(x, y, **style(name))
            sizes = np.linspace(12, 90, len(x))
            axis.scatter(x, y, s=sizes, color=style(name)["color"], alpha=0.75, edgecolors="none")
        axis.plot(start[keys.utility], max(start[keys.forgetting], FLOOR), "ks", label="fine-tuned")
        if retrained:  # a p-value of it against itself is 1
            y = 1.0 if columns[keys.forgetting].p_value else retrained[keys.forgetting]
            axis.plot(retrained[keys.utility], y, "k*", markersize=14, label="retrained")
        _panel(axis, columns[keys.forgetting], None)
        axis.set_title("", loc="left")
        axis.set(xlabel=columns[keys.utility].heading, ylabel=columns[keys.forgetting].heading)
        _legend(axes, outside=True)


def plot_run(history: History, columns: Mapping[str, Column], title: str, path: Path, colour: str) -> None:
    """One run, over its steps: its loss, and a panel for each number of the benchmark."""
    steps = [entry["step"] for entry in history]
    panels = panels_of(columns, [history])
    with drawn(path, title, 1, len(panels) + 1, (3.6 * len(panels) + 3.8, 3.6)) as axes:
        loss, *others = axes.flat
        loss.plot(steps[1:], [entry["train_loss"] for entry in history[1:]], color=INK, marker="o", markersize=3.5)
        loss.set_title("loss", loc="left", fontsize=11)
        for axis, (key, column) in zip(others, panels.items(), strict=True):
            axis.plot(steps, [entry[key] for entry in history], color=colour, marker="o", markersize=3.5)
            _panel(axis, column, None)
        for axis in axes.flat:
            axis.set(xlabel="step")
            axis.locator_params(axis="x", integer=True)


def style(name: str) -> dict[str, Any]:
    method = METHODS[name]
    return {"color": method.colour, "linestyle": method.line_style, "label": method.label, "linewidth": 2}


def _panel(axis: Axes, column: Column, retrained: float | None) -> None:
    axis.set_title(column.panel or "", loc="left", fontsize=11)
    if column.p_value:
        axis.set(yscale="log", ylim=(None, 1.6))
        axis.axhline(GOOD_P, color="#444444", linestyle=DOTTED, linewidth=1)
    else:
        axis.set(ylim=(-0.03, 1.03))
        if retrained is not None:
            axis.axhline(retrained, color="#444444", linestyle=DOTTED, linewidth=1)


def _end_values(axis: Axes, last: list[tuple[float, float, str]]) -> None:
    """In words, moved apart where they would overprint."""
    heights: list[float] = []
    for value, epoch, colour in sorted(last):
        heights.append(max(value, heights[-1] + 0.055) if heights else value)
        place: dict[str, Any] = {
            "xytext": (9, 0),
            "textcoords": "offset points",
            "va": "center",
            "annotation_clip": False,
        }
        axis.annotate(f"{value:.2f}", (epoch, heights[-1]), color=colour, fontweight="bold", **place)


def _legend(axes: np.ndarray, outside: bool) -> None:
    first = axes.flat[0]
    if outside:
        handles, labels = first.get_legend_handles_labels()
        first.figure.legend(handles, labels, loc="outside right upper", frameon=False)
    else:
        first.legend(frameon=False)
