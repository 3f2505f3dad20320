"""Labels at the ends of curves, where they cover neither each other nor the curves."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

DISTANCES = (9, 14, 22, 32, 44, 58)  # points from the end of a curve
ANGLES = np.arange(0, 360, 30)
SAMPLES = 40  # points of a piece of a curve that a label should not cover
FAR = 0.15  # of a covered point, what a point (1/72 inch) away from the end of the curve costs


class Label(NamedTuple):
    text: str
    x: float  # the end of the curve, in data
    y: float
    colour: str
    strong: bool = True


def place(axis: Axes, labels: Sequence[Label], curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write each label near its end, the first ones first; a thin line leads to it where it is not beside it.

    `curves`: (x, y) in data, what should stay visible, single points included. The limits of the axes are taken as
    they are, and the figure has to have its final layout.
    """
    canvas = axis.figure.canvas
    renderer: Any = canvas.get_renderer()  # type: ignore[attr-defined]  # of Agg
    scale = axis.figure.dpi / 72
    window = axis.get_window_extent(renderer)
    points = np.concatenate([_sampled(axis, *curve) for curve in curves])
    taken: list[Bbox] = []
    for label in labels:
        style: dict[str, Any] = {
            "fontsize": 10 if label.strong else 8.5,
            "fontweight": "bold" if label.strong else None,
        }
        text = axis.annotate(label.text, (label.x, label.y), color=label.colour, zorder=6, **style)
        size = text.get_window_extent(renderer)
        end = axis.transData.transform((label.x, label.y))
        best, at = np.inf, (0.0, 0.0)
        for distance, angle in product(DISTANCES, np.radians(ANGLES)):
            offset = distance * np.array([np.cos(angle), np.sin(angle)])
            box = _box(end + scale * offset, size.width, size.height, offset)
            cost = FAR * distance + _covered(box, points) + 60 * sum(_overlap(box, other) for other in taken)
            cost += 1000 * (not _inside(box, window))
            if cost < best:
                best, at, chosen = cost, (float(offset[0]), float(offset[1])), box
        text.remove()
        taken.append(chosen)
        corner = ((chosen.x0 - end[0]) / scale, (chosen.y0 - end[1]) / scale)
        line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2, "alpha": 0.7}
        axis.annotate(
            label.text, (label.x, label.y), xytext=corner, textcoords="offset points", color=label.colour, zorder=6,
            va="bottom", arrowprops=line if np.hypot(*at) > DISTANCES[1] else None, **style,
        )  # fmt: skip


def _sampled(axis: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(points, 2) in pixels, along the curve."""
    corners = axis.transData.transform(np.column_stack([x, y]))
    if len(corners) == 1:
        return corners
    at = np.linspace(0, len(corners) - 1, SAMPLES * (len(corners) - 1) + 1)
    return np.column_stack([np.interp(at, np.arange(len(corners)), corners[:, i]) for i in range(2)])


def _box(near: np.ndarray, width: float, height: float, offset: np.ndarray) -> Bbox:
    """Of a text whose nearest side or corner is at `near`, away from the end of the curve."""
    x = near[0] - width * (1 - np.sign(round(offset[0], 6))) / 2
    y = near[1] - height * (1 - np.sign(round(offset[1], 6))) / 2
    return Bbox.from_bounds(x, y, width, height)


def _covered(box: Bbox, points: np.ndarray) -> int:
    inside = (points > (box.x0 - 2, box.y0 - 1)) & (points < (box.x1 + 2, box.y1 + 1))
    return int(inside.all(axis=1).sum())


def _overlap(one: Bbox, other: Bbox) -> bool:
    return one.padded(2).overlaps(other)


def _inside(box: Bbox, window: Bbox) -> bool:
    return box.x0 >= window.x0 and box.x1 <= window.x1 and box.y0 >= window.y0 and box.y1 <= window.y1
