"""The figure of a run: answer probability per epoch, on forgotten and on retained authors, method by method."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from training.methods import METHODS
from training.stages import renamed_when_done

# Blue and vermilion of the Okabe-Ito palette: told apart by colour-blind readers, and in grey by the markers.
STYLES = {"npo_rt": {"color": "#0072B2", "marker": "o"}, "ga": {"color": "#D55E00", "marker": "s"}}
PANELS = {"forget_probability": "Authors to forget", "retain_probability": "Authors to keep"}
INK, PALE = "#222222", "#dddddd"


def plot_run(histories: dict[str, list[dict]], title: str, path: Path) -> None:
    """One panel a set of authors; histories[method] is a list of {"epoch", "forget_probability", ...}."""
    with plt.rc_context({"font.size": 11, "text.color": INK, "axes.labelcolor": INK}):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True, layout="constrained")
        for axis, (key, heading) in zip(axes, PANELS.items(), strict=True):
            _panel(axis, histories, key)
            axis.set_title(heading, loc="left", fontsize=12)
        axes[0].set_ylabel("answer probability, exp(mean log p)")
        axes[0].legend(frameon=False, loc="upper right")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        with renamed_when_done(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)


def _panel(axis: Axes, histories: dict[str, list[dict]], key: str) -> None:
    for method, history in histories.items():
        epochs, values = [h["epoch"] for h in history], [h[key] for h in history]
        style = STYLES[method]
        axis.plot(
            epochs,
            values,
            label=METHODS[method].label,
            color=style["color"],
            marker=style["marker"],
            linewidth=2.2,
            markersize=5.5,
        )
    # the last values in words, moved apart where they would overprint
    heights: list[float] = []
    for method, history in sorted(histories.items(), key=lambda item: item[1][-1][key]):
        value = history[-1][key]
        heights.append(max(value, heights[-1] + 0.055) if heights else value)
        axis.annotate(
            f"{value:.2f}",
            (history[-1]["epoch"], heights[-1]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=STYLES[method]["color"],
            fontweight="bold",
            annotation_clip=False,
        )
    axis.set(xlabel="unlearning epoch", ylim=(-0.03, 1.03))
    axis.locator_params(axis="x", integer=True)
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
