"""The report's figures, each one inline <svg> element.

They are drawn about as wide as a phone, since an SVG's text shrinks with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jorch.evals.labels import Mark, place_labels
from jorch.evals.svg import BASE, INK, MUTED, ORACLE, OTHER, TRAINED, new_axes, report_style, to_svg
from jorch.evals.tables import Column, Row, mean_of

_COLOURS = {"base": BASE, "trained": TRAINED, "oracle": ORACLE}
_DOT: dict[str, Any] = {"fmt": "o", "markersize": 6, "linewidth": 1.6, "zorder": 3}


def _colour(row: Row) -> str:
    return _COLOURS.get(row.name, OTHER)


def _errors(estimate: Mapping[str, Any], scale: float) -> np.ndarray:
    """Distances below and above the mean, f64[2, 1]; zero where there is no interval."""
    low, high = estimate["ci95"]
    if low is None or high is None:
        return np.zeros((2, 1))
    return scale * np.array([[max(0.0, estimate["mean"] - low)], [max(0.0, high - estimate["mean"])]])


def _number(column: Column) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:.6g}".replace("-", "−") + (" %" if column.unit == "%" else ""))


def trend(values: np.ndarray) -> np.ndarray:
    """Smooth f64[n], n >= 2: each point is the line fitted to about an eighth of the points around it, there.

    Lines, unlike means, do not bend at the ends, where a curve's first and last values are read.
    """
    count, reach = len(values), max(2, len(values) // 16)
    smoothed = np.empty(count)
    for i in range(count):
        near = np.arange(max(0, i - reach), min(count, i + reach + 1))
        smoothed[i] = np.polyfit(near - i, values[near], 1)[1]
    return smoothed


@report_style
def curve(column: Column, steps: np.ndarray, values: np.ndarray) -> str:
    """A metric over steps: every step faintly, their trend on top."""
    axes = new_axes(3.1, 1.75)
    scaled = values * column.scale
    axes.plot(steps, scaled, color=TRAINED, linewidth=0.9, alpha=0.35)
    axes.plot(steps, trend(scaled), color=TRAINED, linewidth=1.8)
    low, high = scaled.min(), scaled.max()
    # The second term keeps a constant from being drawn on a scale of rounding errors.
    margin = max(0.08 * (high - low), 0.02 * max(abs(low), abs(high))) or 1.0
    axes.set_ylim(low - margin, min(high + margin, 100.5) if column.unit == "%" else high + margin)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_number(column))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("step")
    return to_svg(axes, column.key, f"{column.title} over training steps")


@report_style
def ranking(column: Column, rows: Sequence[Row]) -> str:
    """One metric of every policy as a dot with its interval, best on top."""
    shown = [row for row in rows if mean_of(row.estimates, column.key) is not None]
    shown.sort(key=lambda row: row.estimates[column.key]["mean"])
    axes = new_axes(4.3, 0.7 + 0.32 * len(shown))
    for y, row in enumerate(shown):
        estimate = row.estimates[column.key]
        x = estimate["mean"] * column.scale
        axes.errorbar(x, y, None, _errors(estimate, column.scale), color=_colour(row), **_DOT)
        axes.annotate(column.value(estimate["mean"]), (x, y), (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(shown)), [row.label for row in shown], color=INK)
    axes.set_ylim(-0.6, len(shown) - 0.2)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"mean {column.title}")
    return to_svg(axes, f"ranking {column.key}", f"{column.title} of every policy")


@report_style
def scatter(x: Column, y: Column, rows: Sequence[Row]) -> str:
    """Every policy in the plane of two metrics with both intervals, labelled in place."""
    # Models come first, so that their labels stay nearest to their points.
    ordered = sorted(rows, key=lambda row: row.kind == "baseline" and row.name != "oracle")
    axes = new_axes(4.3, 3.0)
    marks = []
    for row in ordered:
        across, up = row.estimates[x.key], row.estimates[y.key]
        if across["mean"] is None or up["mean"] is None:
            continue
        point = across["mean"] * x.scale, up["mean"] * y.scale
        x_errors, y_errors = _errors(across, x.scale), _errors(up, y.scale)
        axes.errorbar(point[0], point[1], y_errors, x_errors, color=_colour(row), **_DOT)
        marks.append(Mark(row.label, np.array(point), np.hstack([x_errors, y_errors])))
    _leave_room(axes, y, marks)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(_number(y))
    axes.set_xlabel(f"mean {x.title} per task, {x.unit}")
    axes.set_ylabel(y.title)
    place_labels(axes, marks, MUTED)
    return to_svg(axes, f"{y.key} {x.key}", f"{y.title} against {x.title} of every policy")


def _leave_room(axes: Axes, y: Column, marks: Sequence[Mark]) -> None:
    """Limits with space for labels, but no ticks above 100 %."""
    low = min((mark.point[1] - mark.errors[0, 1] for mark in marks), default=0.0)
    high = max((mark.point[1] + mark.errors[1, 1] for mark in marks), default=1.0)
    span = max(high - low, 0.02 * y.scale)
    axes.set_ylim(low - 0.35 * span, high + 0.55 * span)
    axes.margins(x=0.2)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if y.unit != "%" or tick <= 100])


def expert_bars(shares: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Which experts each policy calls, as (function, figure) pairs of shares of the calls to that function.

    Args:
        shares: per policy {expert: share of all its calls}, experts named "answer skill 3". Names without a
            skill are billed tools; those are one figure of shares of all calls.
    """
    panels: dict[str, list[str]] = {}
    for expert in sorted({expert for counts in shares.values() for expert in counts}):
        panels.setdefault(expert.rpartition(" skill ")[0] or "tools", []).append(expert)
    return [(function, _bars(function, experts, shares)) for function, experts in panels.items()]


@report_style
def _bars(function: str, experts: Sequence[str], shares: Mapping[str, Mapping[str, float]]) -> str:
    axes = new_axes(3.1, 0.45 + 0.17 * len(experts) * (len(shares) + 0.8))
    height = 0.8 / len(shares)
    for order, (policy, share_of) in enumerate(shares.items()):
        total = sum(share_of.get(expert, 0.0) for expert in experts) or 1.0
        widths = [100 * share_of.get(expert, 0.0) / total for expert in experts]
        ys = np.arange(len(experts)) + (order - (len(shares) - 1) / 2) * height
        axes.barh(ys, widths, height * 0.86, color=_COLOURS.get(policy, OTHER))
        for y, width in zip(ys, widths, strict=True):
            axes.text(width + 1.5, y, f"{width:.0f}", va="center", fontsize=8)
    names = [expert.removeprefix(f"{function} ") for expert in experts]
    axes.set_yticks(range(len(experts)), names, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    return to_svg(axes, f"calls {function}", f"experts called for {function}")
