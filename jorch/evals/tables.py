"""summary.json as words and rows: the headline, the terminal's final table, and the report's number formats.

A summary is {"base": entry, "trained": entry, "baselines": {name: entry}, ...}, or of a single policy
{"model": entry, ...} or {"gold": entry, ...}, with entries as `metrics.summarise` returns them; all may be absent.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

Summary = Mapping[str, Any]
NOTHING = "–"
Kind = Literal["base", "trained", "policy", "baseline"]
_MODELS: dict[str, Kind] = {"base": "base", "trained": "trained", "model": "policy", "gold": "policy"}
_FILE_WIDTH = 100
"""Columns of the table where it goes into a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Column:
    """How a metric is shown: values times `scale`, with `digits` decimals, in `unit`."""

    key: str
    title: str
    unit: str
    scale: float
    digits: int = 3

    def value(self, number: float | None) -> str:
        """Example: Column("accuracy", "accuracy", "%", 100, 1).value(.974) == "97.4"."""
        return NOTHING if number is None else f"{number * self.scale:.{self.digits}f}".replace("-", "−")


@dataclass(frozen=True, slots=True)
class Row:
    """A policy of the summary; `estimates` maps metric names to {"mean", "ci95"}."""

    name: str
    label: str
    kind: Kind
    estimates: Mapping[str, Any]


def policy_rows(summary: Summary) -> list[Row]:
    """The base, the trained model or the only policy, then the baselines, as far as the summary has them."""
    models = [Row(name, name, kind, summary[name]) for name, kind in _MODELS.items() if summary.get(name)]
    baselines = [
        Row(name, name.replace("_", " "), "baseline", entry) for name, entry in (summary.get("baselines") or {}).items()
    ]
    return models + baselines


def columns(summary: Summary) -> tuple[Column, ...]:
    """The table's metrics; costs in thousandths of a dollar where every mean is below ten cents."""
    largest = max((mean_of(row.estimates, "cost_usd") or 0.0 for row in policy_rows(summary)), default=0.0)
    unit, scale = ("m$", 1e3) if largest < 0.1 else ("$", 1.0)
    return (
        Column("utility", "utility", "", 1, 3),
        Column("accuracy", "accuracy", "%", 100, 1),
        Column("cost_usd", "cost", unit, scale, 2),
        Column("cost_per_solved_usd", "cost per solved", unit, scale, 2),
        Column("latency_s", "latency", "s", 1, 2),
        Column("preference_followed", "followed", "%", 100, 1),
        Column("format_valid", "valid", "%", 100, 1),
    )


def mean_of(entry: Mapping[str, Any] | None, key: str) -> float | None:
    """An entry's mean of a metric, None where the entry or the metric is missing."""
    return ((entry or {}).get(key) or {}).get("mean")


def half_width(estimate: Mapping[str, Any] | None) -> float | None:
    """Half of an estimate's 95 % interval, None where it has none."""
    low, high = (estimate or {}).get("ci95") or (None, None)
    return None if low is None or high is None else (high - low) / 2


def print_results(summary: Summary) -> None:
    """Print the table and the headline; in a narrow terminal the table goes without its intervals."""
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)
    table = results_table(summary)
    if Measurement.get(console, console.options.update(max_width=2 * _FILE_WIDTH), table).maximum > console.width:
        table = results_table(summary, intervals=False)
    console.print(table)
    console.print(headline(summary))


def results_table(summary: Summary, *, intervals: bool = True) -> Table:
    """The table with which a run ends in the terminal, at most 100 columns wide."""
    rows = policy_rows(summary)
    shown = [column for column in columns(summary) if column.key != "cost_per_solved_usd"]
    num_tasks = max((row.estimates.get("num_tasks", 0) for row in rows), default=0)
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        caption=f"mean{' ± half of the 95 % interval' if intervals else ''} over {num_tasks:,} tasks",
        caption_justify="left",
    )
    table.add_column("policy", no_wrap=True)
    for column in shown:
        title = f"{column.title}, {column.unit}" if column.unit else column.title
        table.add_column(title, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = []
        for column in shown:
            half = half_width(row.estimates.get(column.key))
            spread = f" ±{column.value(half)}" if intervals and half is not None else ""
            cells.append(column.value(mean_of(row.estimates, column.key)) + spread)
        last_model = row.kind != "baseline" and rows[number + 1 : number + 2] != []
        ends_section = last_model and rows[number + 1].kind == "baseline"
        table.add_row(row.label, *cells, style="bold" if row.kind == "trained" else None, end_section=ends_section)
    return table


@dataclass(frozen=True, slots=True)
class Changes:
    """From base to trained; None where an ingredient is missing. Shares are fractions, not per cent."""

    gap_closed: float | None
    """Share of the utility gap between base and oracle."""
    cost: float | None
    """Relative change of the mean cost."""
    accuracy: float | None
    """Difference of the solved shares."""
    followed: float | None
    """Difference of the shares of preferences followed."""


def changes(summary: Summary) -> Changes:
    """What training changed, all from greedy means."""
    base, trained = summary.get("base"), summary.get("trained")
    oracle = (summary.get("baselines") or {}).get("oracle")

    def difference(key: str, start: Any = base, end: Any = trained) -> float | None:
        first, last = mean_of(start, key), mean_of(end, key)
        return None if first is None or last is None else last - first

    gain, gap = difference("utility"), difference("utility", end=oracle)
    cost, base_cost = difference("cost_usd"), mean_of(base, "cost_usd")
    return Changes(
        gap_closed=gain / gap if gain is not None and gap is not None and gap > 0 else None,
        cost=cost / base_cost if cost is not None and base_cost else None,
        accuracy=difference("accuracy"),
        followed=difference("preference_followed"),
    )


def signed(number: float, unit: str, digits: int = 0) -> str:
    """Example: signed(-.237 * 100, "%") == "−24 %"; what rounds to zero gets no sign."""
    text = f"{abs(number):.{digits}f}"
    sign = "" if float(text) == 0 else "−" if number < 0 else "+"
    return f"{sign}{text} {unit}"


def headline(summary: Summary) -> str:
    """One sentence on what training changed, or on the evaluated policy where there was no training."""
    base, trained = (mean_of(summary.get(name), "utility") for name in ("base", "trained"))
    if base is None or trained is None:
        return _evaluation_headline(summary)
    change = changes(summary)
    if change.gap_closed is None:
        start = f"Training moved utility from {_utility(base)} to {_utility(trained)}"
    elif change.gap_closed >= 0:
        start = f"Training closed {100 * change.gap_closed:.0f} % of the utility gap between base and oracle"
    else:
        lost = f"utility fell from {_utility(base)} to {_utility(trained)}"
        start = f"Training closed none of the utility gap between base and oracle: {lost}"
    parts = []
    if change.cost is not None:
        parts.append(f"cost {signed(100 * change.cost, '%')}")
    if change.accuracy is not None:
        parts.append(f"accuracy {signed(100 * change.accuracy, 'points', 1)}")
    if change.followed is not None:
        parts.append(f"preferences followed {signed(100 * change.followed, 'points')}")
    return "; ".join([start, ", ".join(parts)] if parts else [start]) + "."


def _evaluation_headline(summary: Summary) -> str:
    rows = [row for row in policy_rows(summary) if mean_of(row.estimates, "accuracy") is not None]
    if not rows:
        return "No policy was evaluated."
    row = rows[0]
    count = row.estimates.get("num_tasks", 0)
    cost = mean_of(row.estimates, "cost_usd") or 0.0
    solved = 100 * (mean_of(row.estimates, "accuracy") or 0.0)
    label = row.label[0].upper() + row.label[1:]
    return f"{label} solved {solved:.1f} % of {count:,} tasks at ${cost:.4f} a task."


def _utility(mean: float) -> str:
    return f"{mean:.3f}".replace("-", "−")
