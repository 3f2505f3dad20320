"""The figures of the Markov experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from training.papers.simnpo_markov.experiment import BUDGET
from training.papers.simnpo_markov.report import column
from training.reports.figures import DOTTED, INK, LineStyle, drawn

COLOURS = {"NPO": "#0072B2", "SimNPO": "#D55E00"}
LINES: dict[str, LineStyle] = {"forget1": "-", "forget2": "--"}


def plot_paths(metrics: dict[str, Any], title: str, path: Path) -> None:
    """Forget quality of each chain over retain distance, a panel a case: medians of the seeds at each step.

    Dotted: the retrained model's quality, and the retain distance at which methods are compared.
    """
    paths, aim = metrics["paths"], metrics["models"]["aim"]
    size = (3.1 * len(paths) + 0.4, 4.2)
    with drawn(path, title, 1, len(paths), size, sharex=True, sharey=True) as axes:
        for axis, (case, methods) in zip(axes[0], paths.items(), strict=True):
            for method, colour in COLOURS.items():
                of = methods[method]
                for chain, line in LINES.items():
                    style = {"color": colour, "linewidth": 2, "marker": "o", "markersize": 2.5}
                    axis.plot(of["retain_quality"], of[f"{chain}_quality"], line, **style)
            axis.axhline(aim, color="#444444", linestyle=DOTTED, linewidth=1)
            axis.axvline(BUDGET, color="#444444", linestyle=DOTTED, linewidth=1)
            axis.set_title(f"forget2 of {case}", loc="left", fontsize=11)
            axis.set(xlabel="retain distance (nats)", xlim=(0, 3 * BUDGET), ylim=(0, 3 * aim))
        axes[0, 0].set(ylabel="forget quality (nats)")
        axes[0, 0].annotate("retrained", (3 * BUDGET, aim), (-2, 3), textcoords="offset points", ha="right", fontsize=8)
        _legend(axes)


def plot_lengths(metrics: dict[str, Any], lengths: list[int], title: str, path: Path) -> None:
    """Over the length of forget2: forget quality at the same retain distance, and the least forget distance.

    Lines are means of the seeds, and dots the seeds.
    """
    with drawn(path, title, 1, 2, (10, 4.2)) as axes:
        quality, least = axes[0]
        for method, colour in COLOURS.items():
            for axis, name, line in (
                (quality, "spent_forget1", LINES["forget1"]),
                (quality, "spent_forget2", LINES["forget2"]),
                (least, "best_distance", ":"),
            ):
                values = np.array([column(metrics, str(length), method, name) for length in lengths])
                axis.plot(lengths, values.mean(1), line, color=colour, linewidth=2)
                axis.plot(lengths, values, "o", color=colour, markersize=3.5, alpha=0.5)
        quality.axhline(metrics["models"]["aim"], color="#444444", linestyle=DOTTED, linewidth=1)
        quality.set_title(f"forget quality at retain distance {BUDGET:g}", loc="left", fontsize=11)
        least.set_title("least forget distance, mean of both chains", loc="left", fontsize=11)
        for axis in axes[0]:
            axis.set(xscale="log", xlabel="length of forget2 (forget1: 20)", ylabel="nats", ylim=(0, None))
            axis.set_xticks(lengths, [str(length) for length in lengths])
            axis.minorticks_off()
        _legend(axes)


def _legend(axes: np.ndarray) -> None:
    lines = [Line2D([], [], color=colour, linewidth=2) for colour in COLOURS.values()]
    lines += [Line2D([], [], color=INK, linestyle=line, linewidth=2) for line in LINES.values()]
    figure = axes[0, 0].figure
    figure.legend(lines, [*COLOURS, *LINES], loc="outside lower center", ncols=len(lines), frameon=False)
