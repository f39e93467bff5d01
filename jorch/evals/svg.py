"""Drawing with matplotlib into inline SVG whose colours are CSS variables, for light and dark screens alike.

Used by `plots.py`. Text stays text and takes the page's font; the page's CSS sets the size.
"""

import html
import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins that no palette would use: `to_svg` replaces each by its CSS variable.
INK, MUTED, RULE, TRAINED, BASE, ORACLE, OTHER = (f"#01010{i}" for i in range(7))
_CSS = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    TRAINED: "trained",
    BASE: "base",
    ORACLE: "oracle",
    OTHER: "other",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jorch",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


report_style = mpl.rc_context(_STYLE)
"""Decorator: a function's figures are drawn in the report's style."""


def new_axes(width_in: float, height_in: float) -> Axes:
    """The only axes of a new figure."""
    return Figure(figsize=(width_in, height_in), layout="constrained").add_subplot()


def to_svg(axes: Axes, name: str, description: str) -> str:
    """The axes' figure as one <svg> element.

    Args:
        name: keeps the element's ids apart from those of other figures on the page.
        description: for those who cannot see it.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    document = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(document, format="svg", transparent=True, metadata=no_metadata)
    svg = document.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    head, rest = svg.removeprefix("<svg").split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'<svg role="img" aria-label="{html.escape(description)}"{head}>{rest}'.strip()
