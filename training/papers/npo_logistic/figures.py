"""The figures of the logistic experiment."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.lines import Line2D

from training.papers.npo_logistic.collapse import NUM_ROWS, Divergence
from training.papers.npo_logistic.experiment import Curve
from training.papers.npo_logistic.methods import METHODS
from training.reports.figures import INK, LineStyle, drawn

# Okabe-Ito, told apart by colour-blind readers; one colour a family in every panel, and a line style for print in grey.
FAMILIES: dict[str, tuple[str, str, LineStyle]] = {
    "ga": ("GA", "#D55E00", "-"),
    "npo": ("NPO", "#0072B2", "-"),
    "simnpo": ("SimNPO", "#56B4E9", "--"),
    "kto": ("KTO", "#009E73", "-."),
    "dpo": ("DPO", "#CC79A7", "--"),
    "idk": ("IDK", "#8a8a8a", ":"),
}
COLUMNS = {None: "forget loss alone", "RT": "+ retain likelihood (RT)", "KL": "+ KL to the reference (KL)"}


def plot_methods(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Forget distance above retain distance, over steps, a column a retain term; medians and quartiles of the seeds."""
    with drawn(path, title, 2, 3, (12, 7), sharex=True, sharey="row") as axes:
        for column, (retain, heading) in enumerate(COLUMNS.items()):
            names = [name for name, method in METHODS.items() if method.retain == retain]
            for name in names:
                _, colour, line = FAMILIES[METHODS[name].family]
                for axis, values in zip(axes[:, column], (curves[name].forget, curves[name].retain), strict=True):
                    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
                    axis.plot(curves[name].steps, middle, line, color=colour, linewidth=2)
                    axis.fill_between(curves[name].steps, low, high, color=colour, alpha=0.12, linewidth=0)
            axes[0, column].set_title(heading, loc="left", fontsize=11)
            axes[1, column].set(xlabel="gradient step")
        for axis, label in zip(axes[:, 0], ("forget distance (nats)", "retain distance (nats)"), strict=True):
            axis.set(ylabel=label, yscale="log")
        lines = [Line2D([], [], color=c, linestyle=line, linewidth=2) for _, c, line in FAMILIES.values()]
        names = [label for label, _, _ in FAMILIES.values()]
        axes[0, 0].figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)


def plot_beta(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Retain distance over steps, and against forget distance, for GA and NPO from small to large beta."""
    colours = ["#D55E00", *matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(curves) - 1))]
    with drawn(path, title, 1, 2, (10, 4.2)) as axes:
        for colour, (name, curve) in zip(colours, curves.items(), strict=True):
            forget, retain = np.median(curve.forget, 0), np.median(curve.retain, 0)
            style = {"color": colour, "linewidth": 2.6 if name == "GA" else 1.8, "ls": "--" if name == "GA" else "-"}
            axes[0, 0].plot(curve.steps[1:], retain[1:], label=name, **style)
            axes[0, 1].plot(forget, retain, **style)
        axes[0, 0].set(xscale="log", yscale="log", xlabel="gradient step", ylabel="retain distance (nats)")
        axes[0, 1].set(xscale="log", yscale="log", xlabel="forget distance (nats)")
        axes[0, 0].legend(frameon=False, fontsize=9)


def plot_collapse(divergences: list[Divergence], title: str, path: Path) -> None:
    """||X (theta_t - theta_0)|| over steps: a line in log-log axes for GA, in semi-log axes for NPO; theory dashed."""
    colours = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"]
    with drawn(path, title, 1, 2, (10, 4.2)) as axes:
        for colour, d in zip(colours, divergences, strict=True):
            name = "GA" if d.beta is None else f"NPO, beta {d.beta:g}"
            ends = d.steps[[d.steps.searchsorted(d.steps[-1] / 1000), -1]]
            rate = f"exponent {d.measured:.3f}" if d.beta is None else f"slope {d.measured:.3g}, theory {d.theory:.3g}"
            axes[0, 0].plot(d.steps, d.distance, color=colour, linewidth=2, label=f"{name}: {rate}")
            if d.beta is None:
                axes[0, 0].plot(ends, ends / NUM_ROWS**0.5, "--", color=INK, linewidth=1)
            else:
                axes[0, 1].plot(d.steps, d.distance, color=colour, linewidth=2, label=name)
                axes[0, 1].plot(ends, d.distance[-1] + d.theory * np.log(ends / ends[1]), "--", color=INK, linewidth=1)
        axes[0, 0].set(xscale="log", yscale="log", xlabel="gradient step t", ylabel=r"$\|X(\theta_t-\theta_0)\|$")
        axes[0, 1].set(xscale="log", xlabel="gradient step t")
        axes[0, 1].set_title("NPO alone, on a linear axis; dashed: theory", loc="left", fontsize=11)
        axes[0, 0].legend(frameon=False, fontsize=9)
