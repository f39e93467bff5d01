"""Placing labels beside the points of a plot without overlaps. Used by `plots.py`."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

_CHARACTER_WIDTH_PT, _LINE_HEIGHT_PT = 5.5, 12.0
"""Of 9-point text in DejaVu Sans, the widest font that the page may fall back to."""


class Mark(NamedTuple):
    """A point f64[2] with the distances f64[2 (below, above), 2 (x, y)] to the ends of its error bars."""

    label: str
    point: np.ndarray
    errors: np.ndarray


def _distance(offset: tuple[float, float]) -> float:
    """Sideways counts half, since labels are wide."""
    return abs(offset[1]) + abs(offset[0]) / 2


# In points, nearest first.
_OFFSETS = sorted(itertools.product((0, -24, 24, -48, 48), (12, -12, 25, -25, 38, -38, 51, -51)), key=_distance)


def place_labels(axes: Axes, marks: Sequence[Mark], leader_colour: str) -> None:
    """Write each label at the nearest free spot around its point, with a thin leader where that is far.

    Greedy, in the order of `marks`; the axes' limits must be final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout fixes where data land
    points_per_pixel = 72 / figure.dpi

    def to_points(data: np.ndarray) -> np.ndarray:
        return axes.transData.transform(data) * points_per_pixel

    frame = Bbox(axes.bbox.get_points() * points_per_pixel)
    taken: list[Bbox] = []
    for _, point, errors in marks:
        x, y = to_points(point)
        (left, bottom), (right, top) = to_points(point - errors[0]), to_points(point + errors[1])
        taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
        taken.append(Bbox.from_extents(left, y - 1, right, y + 1))
        taken.append(Bbox.from_extents(x - 1, bottom, x + 1, top))
    for label, point, _ in marks:
        half = np.array([_CHARACTER_WIDTH_PT * len(label) / 2 + 3, _LINE_HEIGHT_PT / 2])
        centres = to_points(point) + np.array(_OFFSETS)
        spots = [Bbox([centre - half, centre + half]) for centre in centres]
        free = (i for i, spot in enumerate(spots) if _fits(spot, frame, taken))
        chosen = next(free, 0)
        taken.append(spots[chosen])
        _annotate(axes, label, point, _OFFSETS[chosen], leader_colour)


def _fits(spot: Bbox, frame: Bbox, taken: Sequence[Bbox]) -> bool:
    inside = frame.contains(spot.x0, spot.y0) and frame.contains(spot.x1, spot.y1)
    return inside and not any(spot.overlaps(other) for other in taken)


def _annotate(axes: Axes, label: str, point: np.ndarray, offset: tuple[float, float], leader_colour: str) -> None:
    leader = {"arrowstyle": "-", "color": leader_colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    axes.annotate(
        label,
        (point[0], point[1]),
        offset,
        textcoords="offset points",
        ha="center",
        va="center",
        arrowprops=leader | {"relpos": (0.5, 0.5)} if _distance(offset) > 13 else None,
    )
