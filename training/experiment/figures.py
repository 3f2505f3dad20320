"""The figures of the NPO paper's section 5: forget quality against model utility, and both over the epochs."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.methods import METHODS
from training.stages import renamed_when_done

# Okabe and Ito's palette, and two more: told apart by colour-blind readers; methods with a retain term are solid.
FAMILY = {"ga": "#D55E00", "idk": "#999999", "dpo": "#CC79A7", "kto": "#009E73", "npo": "#0072B2", "simnpo": "#E69F00"}
DASHES = {"": "--", "rt": "-", "kl": ":"}
FLOOR = 1e-30  # below this a p-value is drawn on the edge


def runs_of(metrics: dict[str, Any], percent: int) -> dict[str, list[list[dict]]]:
    """{method: histories of its seeds}."""
    found: dict[str, list] = {}
    for run in metrics["runs"]:
        if run["percent"] == percent:
            found.setdefault(run["method"], []).append(run["history"])
    return found


def over_seeds(histories: list[list[dict]], key: str) -> np.ndarray:
    """(seeds, evaluations)"""
    return np.array([[entry[key] for entry in history] for history in histories], dtype=float)


def style(method: str) -> dict[str, Any]:
    family, _, keep = method.partition("_")
    return {"color": FAMILY[family], "linestyle": DASHES[keep], "label": METHODS[method].label, "linewidth": 1.8}


def plot_trade_off(metrics: dict[str, Any], percent: int, path: Path) -> None:
    """Medians over seeds; markers grow with the epochs. The retrained model is the star, where forgetting would end."""
    figure, axis = plt.subplots(figsize=(7.6, 5), layout="constrained")
    for method, histories in runs_of(metrics, percent).items():
        utility = np.median(over_seeds(histories, "model_utility_geometric"), axis=0)
        quality = np.median(over_seeds(histories, "forget_quality"), axis=0).clip(FLOOR)
        axis.plot(utility, quality, **style(method))
        sizes = np.linspace(12, 90, len(utility))
        axis.scatter(utility, quality, s=sizes, color=style(method)["color"], alpha=0.75, edgecolors="none")
    start, retrained = metrics["start"][str(percent)], metrics["retrained"][str(percent)]
    axis.plot(start["model_utility_geometric"], max(start["forget_quality"], FLOOR), "ks", label="fine-tuned")
    axis.plot(retrained["model_utility_geometric"], 1.0, "k*", markersize=14, label="retrained")
    _p_axis(axis)
    axis.set(xlabel="model utility", title=f"forget{percent:02d}: forget quality against utility, epoch by epoch")
    _finish(figure, [axis], path)


def plot_over_epochs(metrics: dict[str, Any], percent: int, path: Path) -> None:
    """Median, and the range over seeds as a band."""
    panels = {"forget_quality": "forget quality (p)", "model_utility_geometric": "model utility",
              "forget_prob": "answer probability, forget", "retain_prob": "answer probability, retain"}  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        for method, histories in runs_of(metrics, percent).items():
            epochs, values = over_seeds(histories, "epoch")[0], over_seeds(histories, key)
            if key == "forget_quality":
                values = values.clip(FLOOR)
            axis.plot(epochs, np.median(values, axis=0), **style(method))
            axis.fill_between(
                epochs, values.min(axis=0), values.max(axis=0), color=style(method)["color"], alpha=0.12, linewidth=0
            )
        axis.set(ylabel=label)
        if key == "forget_quality":
            _p_axis(axis)
        else:
            axis.set(ylim=(-0.02, 1.02))
            axis.axhline(metrics["retrained"][str(percent)][key], color="#444444", linestyle=(0, (1, 2)), linewidth=1)
    for axis in axes[1]:
        axis.set(xlabel="unlearning epoch")
    figure.suptitle(f"forget{percent:02d}; dotted: the retrained model, and p = 0.05")
    _finish(figure, list(axes.flat), path, legend=axes.flat[0])


def _p_axis(axis: Axes) -> None:
    axis.set(yscale="log", ylabel="forget quality (p)", ylim=(None, 3))
    axis.axhline(0.05, color="#444444", linestyle=(0, (1, 2)), linewidth=1)


def _finish(figure: Figure, axes: list[Axes], path: Path, legend: Axes | None = None) -> None:
    for axis in axes:
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = (legend or axes[0]).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    with renamed_when_done(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
