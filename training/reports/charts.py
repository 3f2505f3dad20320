"""Coordinates of the charts on the page of a grid, in percent of the chart, so text keeps its size at any width.

`plot` is forgetting against utility, `panel` the bars of one number.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

from training.benchmarks.base import TradeOff
from training.reports.entries import Model, Number, measured, middle
from training.reports.figures import FLOOR, GOOD_P

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PAD = 0.04  # of the range, around the dots
WIDTH, HEIGHT, LETTER, LINE, RADIUS = 820, 440, 6.2, 14, 7  # of a plot on a desk, in pixels: where labels have room


class Axis(NamedTuple):
    """`ticks`: (place, label), places in % from the low end."""

    low: float  # of a logarithmic axis: the exponent
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]] = ()

    def at(self, value: float) -> float:
        """The position of a value, in %."""
        where = math.log10(max(value, FLOOR)) if self.log else value
        return round(100 * (where - self.low) / (self.high - self.low), 2)

    def marked(self, most: int) -> "Axis":
        """An axis with at most this many intervals between ticks."""
        steps = MaxNLocator(most, integer=self.log, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        inside = [float(tick) for tick in steps if self.low - 1e-9 <= tick <= self.high + 1e-9]
        return self._replace(ticks=[(self.at(10**t if self.log else t), _tick(t, self.log)) for t in inside])


def axis_around(values: Iterable[float], log: bool) -> Axis:
    """Around the dots of a plot, p-values always with 0.05 and 1."""
    found = [math.log10(max(v, FLOOR)) if log else v for v in values]
    low, high = min(found), max(found)
    low, high = (math.floor(min(low, -2)), 0.0) if log else (low, high)
    pad = PAD * (high - low) or 0.5
    return Axis(low - pad, high + pad, log)


def axis_from_zero(values: Iterable[float], log: bool) -> Axis:
    """Of bars: from 0, also to numbers below it; p-values from a power of ten to 1."""
    if log:
        return Axis(math.floor(min(-2, *(math.log10(max(v, FLOOR)) for v in values))), 0.0, True)
    low, high = min(0.0, *values), max(0.0, *values)
    steps = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high if high > low else low + 1)
    return Axis(float(steps[0]), float(steps[-1]), False)


def _tick(value: float, log: bool) -> str:
    if log:
        return "1" if value == 0 else "10" + f"{value:.0f}".translate(SUPERSCRIPTS)
    return f"{value:.6g}".replace("-", "−")


# ------------------------------------------------------------------ forgetting against utility


def plot(models: Sequence[Model], keys: TradeOff, numbers: Sequence[Number]) -> dict[str, Any] | None:
    """Dots of the seeds, marks of their medians, paths over the epochs, labels; None without both numbers before."""
    by_key = {number.key: number for number in numbers if not number.attack}
    if not all(key in by_key and not math.isnan(middle(models[0].values(by_key[key]))) for key in keys):
        return None
    x, y = (by_key[key] for key in keys)
    places = {model.id: _path(model, keys, y.column.p_value) for model in models}
    shown = {id: path for id, path in places.items() if path}
    dots = {model.id: _dots(model, keys, y.column.p_value) for model in models}
    points = [point for some in (*shown.values(), *dots.values()) for point in some]
    across = axis_around((point[0] for point in points), x.column.p_value).marked(7)
    up = axis_around((point[1] for point in points), y.column.p_value).marked(6)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return across.at(point[0]), round(100 - up.at(point[1]), 2)

    drawn = [model for model in models if model.id in shown]
    ends = [place(shown[model.id][-1]) for model in drawn]
    marks = []
    for model, end, (label, fits) in zip(drawn, ends, _labels(drawn, ends), strict=True):
        path = [place(point) for point in shown[model.id]]
        values = " and ".join(f"{n.heading} {middle(model.values(n)):.3g}" for n in (y, x) if _has(model, n))
        marks.append(
            {
                "model": model,
                "path": list(pairwise(path)),
                "dots": [place(point) for point in dots[model.id]] if len(model.seeds) > 1 else [],
                "end": end,
                "label": label,
                "fits": fits,
                "says": f"{model.label}: {values}",
            }
        )
    lines = [(round(100 - up.at(GOOD_P), 2), f"p = {GOOD_P}")] if up.log else []
    rows = [(round(100 - where, 2), text) for where, text in up.ticks]
    return {"x": x.title, "y": y.title, "columns": across.ticks, "rows": rows, "lines": lines, "marks": marks}


def _has(model: Model, number: Number) -> bool:
    return not math.isnan(middle(model.values(number)))


def _dots(model: Model, keys: TradeOff, p_value: bool) -> list[tuple[float, float]]:
    """(utility, forgetting) of every seed at the end, where both were measured."""
    found = [_point(history[-1], keys, model.id == "retrained" and p_value) for history in model.histories]
    return [point for point in found if not any(map(math.isnan, point))]


def _path(model: Model, keys: TradeOff, p_value: bool) -> list[tuple[float, float]]:
    """Medians over the seeds at every evaluation that all of them have."""
    itself = model.id == "retrained" and p_value
    moments = zip(*([_point(entry, keys, itself) for entry in history] for history in model.histories), strict=False)
    found = [(middle([point[0] for point in seeds]), middle([point[1] for point in seeds])) for seeds in moments]
    return [] if any(map(math.isnan, found[-1])) else [point for point in found if not any(map(math.isnan, point))]


def _point(summary: Any, keys: TradeOff, itself: bool) -> tuple[float, float]:
    """`itself`: a p-value of the retrained model, which against itself is 1."""
    return measured(summary, keys.utility), 1.0 if itself else measured(summary, keys.forgetting)


def _labels(models: Sequence[Model], ends: Sequence[tuple[float, float]]) -> list[tuple[dict[str, Any], bool]]:
    """Where the label of each mark stands, and whether it has room there; the first have the choice."""
    centres = [(x * WIDTH / 100, y * HEIGHT / 100) for x, y in ends]
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in centres]
    found = []
    for model, (x, y) in zip(models, centres, strict=True):
        width = LETTER * len(model.label)
        sides = [
            ({"dx": 10, "dy": 4, "anchor": "start"}, (x + 8, y - LINE / 2, x + 12 + width, y + LINE / 2)),
            ({"dx": -10, "dy": 4, "anchor": "end"}, (x - 12 - width, y - LINE / 2, x - 8, y + LINE / 2)),
            ({"dx": 0, "dy": -11, "anchor": "middle"}, (x - width / 2, y - 9 - LINE, x + width / 2, y - 9)),
            ({"dx": 0, "dy": 19, "anchor": "middle"}, (x - width / 2, y + 9, x + width / 2, y + 9 + LINE)),
        ]
        free = [(side, box) for side, box in sides if _inside(box) and not any(_overlap(box, b) for b in taken)]
        side, box = free[0] if free else sides[0] if x < WIDTH / 2 else sides[1]
        taken += [box] if free else []
        found.append((side, bool(free)))
    return found


Box = tuple[float, float, float, float]


def _inside(box: Box) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= WIDTH and box[3] <= HEIGHT


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ------------------------------------------------------------------ bars


def panel(models: Sequence[Model], number: Number, attacked: Sequence[Number]) -> dict[str, Any]:
    """A bar a model, from 0 to the median; a dot where the axis is logarithmic. `attacked`: the same after attacks."""
    found = {model.id: [value for value in model.values(number) if not math.isnan(value)] for model in models}
    after = {model.id: [(n.attack, middle(model.values(n))) for n in attacked if _has(model, n)] for model in models}
    every = [value for values in found.values() for value in values]
    every += [value for values in after.values() for _, value in values]
    axis = axis_from_zero(every, number.column.p_value).marked(4)
    rows = []
    for model in models:
        row: dict[str, Any] = {"model": model, "text": "–", "at": None, "bar": None, "range": None}
        if values := found[model.id]:
            row |= {"text": f"{middle(values):.3g}", "at": axis.at(middle(values))}
            row["bar"] = None if axis.log else _span(axis, 0.0, middle(values))
            row["range"] = _span(axis, min(values), max(values)) if len(values) > 1 else None
        row["after"] = [(name, axis.at(v), f"{v:.3g}") for name, v in after[model.id]]
        rows.append(row)
    retrained = next((row["at"] for row in rows if row["model"].id == "retrained"), None)
    good = axis.at(GOOD_P) if axis.log else None
    return {"title": number.title, "ticks": axis.ticks, "rows": rows, "retrained": retrained, "good": good}


def _span(axis: Axis, one: float, other: float) -> tuple[float, float]:
    """(left, width)"""
    left, right = sorted((axis.at(one), axis.at(other)))
    return left, round(right - left, 2)
