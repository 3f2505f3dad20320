"""The figures of a study on a pre-trained model. Headline methods are strong, the others pale; labels, no legends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from training.benchmarks.tofu.claims import GOOD_QUALITY, LOST
from training.methods import METHODS
from training.pretrained import labels, noise
from training.pretrained.claims_attacks import CONTROL, RELEARNED, ROUNDED, attack_rows, mean_prob
from training.pretrained.labels import Label
from training.pretrained.outcomes import PROB, QUALITY, Arm, Outcomes, number
from training.pretrained.plan import HEADLINE
from training.pretrained.utility import UTILITY
from training.reports.figures import DOTTED, FLOOR, INK, drawn, style

GREY = "#777777"
TRADE_OFF = (
    "Medians over the seeds, a marker a checkpoint, from the full model (square) on; open circles: seeds at the end. "
    "Star: the retain model, which is at p = 1 against itself. Dotted: the retain model of another seed, the ceiling."
)
BARS = "Medians over the seeds. No open bar: the method never keeps 90 % of the retain model's utility."
COLLAPSE = "Strong: medians over the seeds. Thin: each seed."
ATTACKS = "Mean probability of the answers of forget10, one seed. Dotted: the retain model before any attack."
MARKED = {"relearn5": "o", "relearn20": "D", "int8": "o", "int4": "D"}


def write_all(folder: Path, outcomes: Outcomes) -> dict[str, list[str]]:
    """{figure: names of the files that were written}, those whose records are there."""
    found: dict[str, list[str]] = {"trade_off": [], "bars": [], "collapse": [], "attacks": []}
    scenarios = list(outcomes.arms)
    if scenarios:
        trade_off(folder / "trade_off.png", outcomes, scenarios)
        found["trade_off"].append("trade_off.png")
    for scenario in scenarios:
        bars(folder / f"bars_{scenario}.png", outcomes, scenario)
        found["bars"].append(f"bars_{scenario}.png")
    falling = [s for s in scenarios if outcomes.arm(s, "ga") or outcomes.arm(s, "npo")]
    if falling:
        collapse(folder / "collapse.png", outcomes, falling)
        found["collapse"].append("collapse.png")
    if attack_rows(outcomes):
        attacks(folder / "attacks.png", outcomes)
        found["attacks"].append("attacks.png")
    return found


def trade_off(path: Path, outcomes: Outcomes, scenarios: Sequence[str]) -> None:
    """Forget quality against utility, a panel a scenario: medians over the seeds, one marker a checkpoint."""
    title = "Forget quality against utility: the aim is the star, above the line"
    with drawn(path, title, 1, len(scenarios), (6.6 * len(scenarios), 6.2), sharey=True) as axes:
        written: list[tuple[Axes, list[Label], list[tuple[np.ndarray, np.ndarray]]]] = []
        for axis, scenario in zip(axes.flat, scenarios, strict=True):
            written.append((axis, *_paths(axis, outcomes, scenario)))
        axes[0, 0].set(ylabel="forget quality: p-value against the retain model")
        axes[0, 0].figure.canvas.draw()  # the layout, which labels are placed in
        for axis, texts, curves in written:
            labels.place(axis, texts, curves)


def _paths(axis: Axes, outcomes: Outcomes, scenario: str):
    arms = [arm for arm in outcomes.arms[scenario] if len(_medians(arm)[0])]
    arms.sort(key=lambda arm: arm.method not in HEADLINE)
    texts, curves = [], []
    for arm in arms:
        (x, y), strong = _medians(arm), arm.method in HEADLINE
        look = style(arm.method) | {"label": None, "linewidth": 2.4 if strong else 1.2, "alpha": 1 if strong else 0.45}
        axis.plot(x, y, marker="o", markersize=5 if strong else 3, zorder=4 if strong else 3, **look)
        if strong:
            for run in arm.runs:
                axis.plot(
                    run.path(UTILITY)[-1], max(number(run.end, QUALITY), FLOOR), "o", markersize=4, alpha=0.5,
                    markerfacecolor="none", color=look["color"], zorder=3,
                )  # fmt: skip
        colour = METHODS[arm.method].colour if strong else GREY
        texts.append(Label(outcomes.label(arm), float(x[-1]), float(y[-1]), colour, strong))
        curves.append((x, y))
    for x, y, marker, size, text in _models(outcomes, scenario, arms):
        axis.plot(x, y, marker, color="black", markersize=size, zorder=5)
        texts.insert(0, Label(text, x, y, INK))
        curves.append((np.array([x]), np.array([y])))
    axis.axhline(GOOD_QUALITY, color=INK, linewidth=1, linestyle="--", zorder=1)
    ceiling = noise.ceiling(outcomes, scenario)
    if np.isfinite(ceiling):
        axis.axhline(max(ceiling, FLOOR), color=GREY, linewidth=1, linestyle=DOTTED, zorder=1)
    lowest = min((float(y.min()) for _, y in curves), default=FLOOR)
    axis.set(yscale="log", xlabel="model utility", xlim=(-0.03, 1.3 * axis.get_xlim()[1]), ylim=(lowest / 30, 30))
    axis.set_title(scenario, loc="left", fontsize=11)
    left: dict[str, Any] = {"xytext": (3, 2), "textcoords": "offset points", "fontsize": 8.5, "color": GREY}
    axis.annotate(f"p = {GOOD_QUALITY}: not told apart above", (-0.03, GOOD_QUALITY), **(left | {"xytext": (3, -10)}))
    if np.isfinite(ceiling):
        axis.annotate(f"retain model, another seed: {ceiling:.2g}", (-0.03, max(ceiling, FLOOR)), **left)
    left_end = axis.get_xlim()[0] + 0.3 * np.ptp(axis.get_xlim())  # what is written on the lines stays free
    curves += [
        (np.array([-0.03, left_end]), np.array([p, p])) for p in (GOOD_QUALITY / 2, max(ceiling, FLOOR)) if p == p
    ]
    return texts, curves


def _medians(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Utility and forget quality at each checkpoint where both were measured."""
    utility, quality = (np.median(arm.paths(key), axis=0) for key in (UTILITY, QUALITY))
    measured = np.isfinite(utility) & np.isfinite(quality)
    return utility[measured], quality[measured].clip(FLOOR)


def _models(outcomes: Outcomes, scenario: str, arms: Sequence[Arm]):
    """(utility, forget quality, marker, size, name) of those that unlearning is between."""
    if outcomes.retain(scenario):
        yield outcomes.retain_utility(scenario), 1.0, "*", 17, "retain model"
    start = outcomes.models.get("full")
    if arms:
        yield number(arms[0].runs[0].checkpoints[0], UTILITY), float(_medians(arms[0])[1][0]), "s", 8, "full model"
    elif start:
        quality = noise.pair_quality(start, outcomes.retain(scenario))
        if np.isfinite(quality):
            yield number(start, UTILITY), max(quality, FLOOR), "s", 8, "full model"


def bars(path: Path, outcomes: Outcomes, scenario: str) -> None:
    """Forget quality and utility at the end and at the best checkpoint, medians; a dot a seed."""
    arms = outcomes.arms[scenario][::-1]
    least = outcomes.least_utility(scenario)
    title = f"{scenario}: at the end (filled), at the best checkpoint (open); dots: seeds"
    with drawn(path, title, 1, 2, (11, 0.46 * len(arms) + 1.7)) as axes:
        for axis, key in zip(axes.flat, (QUALITY, UTILITY), strict=True):
            lowest = FLOOR
            if key == QUALITY:
                values = np.concatenate([arm.ends(QUALITY) for arm in arms])
                lowest = max(float(np.nanmin(values, initial=GOOD_QUALITY)), FLOOR) / 10
                axis.set(xscale="log", xlim=(lowest, 2.5))
            for y, arm in enumerate(arms):
                colour = METHODS[arm.method].colour
                best = np.array([number(run.best(least), key) for run in arm.runs])
                for at, values, fill in ((y + 0.2, arm.ends(key), colour), (y - 0.2, best, "white")):
                    values = values[np.isfinite(values)]
                    if len(values):
                        shown = values.clip(lowest) if key == QUALITY else values
                        axis.barh(at, np.median(shown), 0.34, color=fill, edgecolor=colour, linewidth=1.2, zorder=2)
                        axis.plot(shown, np.full(len(shown), at), "o", color=INK, markersize=3, zorder=3)
            axis.set(yticks=range(len(arms)), ylim=(-0.6, len(arms) - 0.4))
            axis.tick_params(axis="y", length=0)
        quality, utility = axes.flat
        quality.set_yticklabels([outcomes.label(arm) for arm in arms])
        utility.set_yticklabels([])
        quality.set(xlabel="forget quality (p)")
        retain = np.nan_to_num(outcomes.retain_utility(scenario))
        utility.set(xlabel="model utility", xlim=(0, max(utility.get_xlim()[1], 1.1 * retain)))
        _marked(quality, [(GOOD_QUALITY, f"{GOOD_QUALITY}"), (noise.ceiling(outcomes, scenario), "other\nretain seed")])
        _marked(utility, [(least, "90 % of\nretain"), (retain, "retain")])


def _marked(axis: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """Dotted lines with their names on top; the first name to the left of its line, the last to the right."""
    for (x, text), side in zip(marks, ("right", "left"), strict=True):
        if np.isfinite(x) and x > 0:
            axis.axvline(x, color=INK, linestyle=DOTTED, linewidth=1, zorder=1)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            offset = (-3 if side == "right" else 3, 2)
            axis.annotate(text, (x, 1), xytext=offset, ha=side, va="bottom", fontsize=8.5, color=GREY, **place)


def collapse(path: Path, outcomes: Outcomes, scenarios: Sequence[str]) -> None:
    """Utility over the steps of GA and NPO: medians, thin: the seeds."""
    with drawn(
        path, "Utility on the way: GA and NPO", 1, len(scenarios), (5.4 * len(scenarios), 4.2), sharey=True
    ) as axes:
        for axis, scenario in zip(axes.flat, scenarios, strict=True):
            ends: list[tuple[float, float, str, str]] = []
            for name in ("ga", "npo"):
                arm = outcomes.arm(scenario, name)
                if arm is None:
                    continue
                paths, look = arm.paths(UTILITY), style(name) | {"label": None, "linestyle": "-"}
                steps = arm.runs[0].steps[: paths.shape[1]]
                axis.plot(steps, np.median(paths, axis=0), marker="o", markersize=5, **look)
                axis.plot(steps, paths.T, color=look["color"], linewidth=0.8, alpha=0.5)
                ends.append((float(np.median(paths[:, -1])), float(steps[-1]), METHODS[name].label, look["color"]))
                start, last = float(np.median(paths[:, 0])), float(steps[-1])
            axis.axhline(LOST * start, color=INK, linestyle=DOTTED, linewidth=1)
            apart = 0.07 * start
            heights: list[float] = []
            for y, x, text, colour in sorted(ends):
                heights.append(max(y, heights[-1] + apart) if heights else y)
                axis.annotate(text, (x, heights[-1]), xytext=(8, 0), textcoords="offset points", va="center",
                              color=colour, fontweight="bold", annotation_clip=False)  # fmt: skip
            axis.set(xlabel="step", ylim=(-0.02, None), xlim=(None, last * 1.14))
            axis.set_title(f"{scenario}; dotted: half of the full model's", loc="left", fontsize=11)
        axes[0, 0].set(ylabel="model utility")


def attacks(path: Path, outcomes: Outcomes) -> None:
    """Forget probability before and after, a line a model: relearning to the left, rounding to the right."""
    rows = attack_rows(outcomes)[::-1]
    with drawn(path, "What comes back", 1, 2, (11, 0.5 * len(rows) + 2), sharey=True, sharex=True) as axes:
        control = outcomes.models.get(CONTROL)
        for axis, shown, what in zip(axes.flat, (RELEARNED, ROUNDED), ("relearning", "rounding"), strict=True):
            if control:
                axis.axvline(number(control, PROB), color=GREY, linestyle=DOTTED, linewidth=1, zorder=1)
            for y, (_, method, measures) in enumerate(rows):
                x = {attack: mean_prob(measures[attack]) for attack in ("", *shown) if attack in measures}
                colour = METHODS[method].colour if method else "black"
                axis.plot([*x.values()], [y] * len(x), color=colour, linewidth=2, alpha=0.5, zorder=2)
                axis.plot(x[""], y, "|", color=colour, markersize=16, markeredgewidth=2.5, zorder=3)
                for attack, fill in zip(shown, ("white", colour), strict=True):
                    if attack in x:
                        axis.plot(
                            x[attack], y, MARKED[attack], color=colour, markerfacecolor=fill, markersize=8, zorder=4
                        )
            first, second = shown.values()
            axis.set_title(f"{what}:  |  before   ○  {first}   ◆  {second}", loc="left", fontsize=10)
            axis.set(xlabel="forget probability", yticks=range(len(rows)), ylim=(-0.6, len(rows) - 0.4), xlim=(0, None))
            axis.tick_params(axis="y", length=0)
        axes[0, 0].set_yticklabels([label for label, _, _ in rows])
