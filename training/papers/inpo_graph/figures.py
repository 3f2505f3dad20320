"""The figure of the graph experiment."""

from pathlib import Path

import numpy as np

from training.papers.inpo_graph.experiment import METHODS, Curve
from training.reports.figures import DOTTED, drawn

FAMILIES = {
    "ga": ("GA", "#D55E00", "-"),
    "npo": ("NPO", "#0072B2", "-"),
    "inpo": ("INPO", "#009E73", "-"),
    "mixed": ("INPO, weights mixed", "#8a8a8a", "--"),
}
ROWS = {False: "forget loss alone", True: "+ retain likelihood (RT)"}


def plot_methods(curves: dict[str, Curve], title: str, path: Path) -> None:
    """Forget and test distance over steps, and test distance over the probability of what is forgotten.

    Medians of the seeds, and their range as a band; dotted: the retrained model's probability.
    """
    with drawn(path, title, 2, 3, (12, 7)) as axes:
        for row, (retain, heading) in zip(axes, ROWS.items(), strict=True):
            for name in (name for name, method in METHODS.items() if method.retain == retain):
                curve, (label, colour, line) = curves[name], FAMILIES[METHODS[name].family]
                for axis, key in zip(row[:2], ("forget_kl", "test_kl"), strict=True):
                    values = curve.values[key]
                    axis.plot(curve.steps, np.median(values, 0), line, color=colour, linewidth=2, label=label)
                    axis.fill_between(curve.steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
                probability, distance = (np.median(curve.values[key], 0) for key in ("forget_probability", "test_kl"))
                row[2].plot(probability, distance, line, color=colour, linewidth=2)
                row[2].axvline(np.median(curve.aim), color="#444444", linestyle=DOTTED, linewidth=1)
            row[0].set_title(heading, loc="left", fontsize=11)
            row[0].set(xlabel="step", ylabel="forget distance (nats)")
            row[1].set(xlabel="step", ylabel="test distance (nats)")
            row[2].set(xlabel="mean probability of forget labels", ylabel="test distance (nats)")
            row[2].invert_xaxis()  # time goes to the right, as beside it
            for axis in row:
                axis.set(yscale="log")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
