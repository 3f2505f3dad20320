"""Place labels at the ends of curves without covering other labels or curves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

DISTANCES = np.array([9, 14, 22, 32, 44, 58])  # points from the end of a curve
BESIDE = 14  # up to this far no line leads to a label
ANGLES = np.radians(np.arange(0, 360, 30))
OFFSETS = np.stack([np.outer(DISTANCES, np.cos(ANGLES)), np.outer(DISTANCES, np.sin(ANGLES))], -1).reshape(-1, 2)
MARK = 8 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).repeat(4, axis=0)  # points: the rim of a star or a square
SAMPLES = 40  # points of a piece of a curve that a label should not cover
FAR = 0.15  # of a covered point, what a point (1/72 inch) away from the end of the curve costs
COVERED, OUTSIDE = 60, 1000  # what another label costs, and a place beyond the axes


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
    taken = np.empty((0, 4))
    for label in labels:
        style: dict[str, Any] = {
            "fontsize": 10 if label.strong else 8.5,
            "fontweight": "bold" if label.strong else None,
        }
        text = axis.annotate(label.text, (label.x, label.y), color=label.colour, zorder=6, **style)
        size = text.get_window_extent(renderer)
        end = axis.transData.transform((label.x, label.y))
        boxes = _boxes(end, scale * OFFSETS, size.width, size.height)
        cost = FAR * np.hypot(*OFFSETS.T) + _covered(boxes, points) + COVERED * _overlaps(boxes, taken)
        cost = cost + OUTSIDE * ~_inside(boxes, np.array(window.extents))
        best = int(cost.argmin())
        taken = np.vstack([taken, boxes[best]])
        text.xyann = tuple((boxes[best, :2] - end) / scale)
        text.set(anncoords="offset points", va="bottom", path_effects=[withStroke(linewidth=2.5, foreground="white")])
        if np.hypot(*OFFSETS[best]) > BESIDE:
            line: dict[str, Any] = {"color": label.colour, "linewidth": 0.7, "alpha": 0.7, "zorder": 3}
            corner = np.clip(end, boxes[best, :2], boxes[best, 2:])  # of the label, the nearest
            axis.plot(*axis.transData.inverted().transform([end, corner]).T, **line)


def _sampled(axis: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(points, 2) in pixels, along the curve."""
    corners = axis.transData.transform(np.column_stack([x, y]))
    if len(corners) == 1:  # a mark of its own
        return corners + MARK * axis.figure.dpi / 72
    at = np.linspace(0, len(corners) - 1, SAMPLES * (len(corners) - 1) + 1)
    return np.column_stack([np.interp(at, np.arange(len(corners)), corners[:, i]) for i in range(2)])


def _boxes(end: np.ndarray, offsets: np.ndarray, width: float, height: float) -> np.ndarray:
    """(places, 4) x0, y0, x1, y1 of a text whose nearest side or corner is at each offset from `end`."""
    size = np.array([width, height])
    low = end + offsets - size * (1 - np.sign(offsets.round(6))) / 2
    return np.hstack([low, low + size])


def _covered(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(places,) how many of the points lie in each box."""
    inside = (points > boxes[:, None, :2] - 2) & (points < boxes[:, None, 2:] + 2)
    return inside.all(axis=2).sum(axis=1)


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(places,) how many of the others each box lies on, or nearly so."""
    return (
        ((boxes[:, None, :2] < others[None, :, 2:] + 3) & (boxes[:, None, 2:] > others[None, :, :2] - 3))
        .all(axis=2)
        .sum(axis=1)
    )


def _inside(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    kept = np.hstack([boxes[:, :2] >= window[:2], boxes[:, 2:] <= window[2:]])
    return np.asarray(kept.all(axis=1))
