"""The parts of report.html as plain values for its template. Used by `report.py`."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from markupsafe import Markup

from jorch.evals import plots
from jorch.evals.tables import (
    NOTHING,
    Column,
    Row,
    Summary,
    changes,
    columns,
    mean_of,
    policy_rows,
    signed,
)

Section = dict[str, Any]
Json = Mapping[str, Any]

_CURVES = (
    Column("reward/mean", "reward", "", 1),
    Column("rollout/utility", "utility", "", 1),
    Column("rollout/accuracy", "accuracy", "%", 100),
    Column("rollout/cost_usd", "cost", "m$", 1e3),
    Column("rollout/latency_s", "latency", "s", 1),
    Column("rollout/preference_followed", "preferences followed", "%", 100),
    Column("rollout/format_valid", "format valid", "%", 100),
    Column("group/dropped_fraction", "groups dropped", "%", 100),
    Column("policy/entropy_nats", "entropy", "nats", 1),
    Column("rollout/tool_calls_per_turn", "tool calls a turn", "", 1),
    Column("policy/log_ratio_p99_nats", "log(trainer / sampler), 99th percentile", "nats", 1),
    Column("policy/sampler_gap_nats", "sampler-trainer gap", "nats", 1),
)
_STEP_PARTS = ("sample", "tools", "pack", "learn")
_NUM_EXAMPLES = 3


def duration(seconds: float) -> str:
    """Example: duration(204.2) == "3 min 24 s"."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def dollars(usd: float) -> str:
    """Example: dollars(.003) == "$0.003"; below a hundredth of a cent, in scientific notation."""
    return f"${usd:.2e}" if 0 < usd < 1e-4 else f"${usd:.4f}".rstrip("0").rstrip(".")


def tiles(summary: Summary) -> list[dict[str, str]]:
    """The four numbers under the headline, each with what it is made of."""
    base, trained = summary.get("base"), summary.get("trained")
    shown = {column.key: column for column in columns(summary)}
    change = changes(summary)

    def before_after(key: str) -> str:
        column = shown[key]
        first, last = column.value(mean_of(base, key)), column.value(mean_of(trained, key))
        return f"{first} → {last} {column.unit}".strip()

    oracle = shown["utility"].value(mean_of((summary.get("baselines") or {}).get("oracle"), "utility"))
    entries = (
        ("utility gap closed", change.gap_closed, "%", 0, f"{before_after('utility')}, oracle {oracle}"),
        ("cost per task", change.cost, "%", 0, before_after("cost_usd")),
        ("accuracy", change.accuracy, "points", 1, before_after("accuracy")),
        ("preferences followed", change.followed, "points", 0, before_after("preference_followed")),
    )
    return [
        {
            "title": title,
            # The share of the gap is an amount, not a change.
            "value": signed(100 * value, unit, digits).removeprefix("+" if title.startswith("utility") else ""),
            "detail": detail,
        }
        for title, value, unit, digits, detail in entries
        if value is not None
    ]


def facts(summary: Summary, metrics: Sequence[Json]) -> list[str]:
    """The line under the headline."""
    num_tasks = max((row.estimates.get("num_tasks", 0) for row in policy_rows(summary)), default=0)
    told = [f"{num_tasks:,} evaluation tasks"] if num_tasks else []
    if metrics:
        told.append(f"{len({row['step'] for row in metrics})} training steps")
    if summary.get("seed") is not None:
        told.append(f"seed {summary['seed']}")
    if summary.get("wall_s"):
        told.append(duration(sum(summary["wall_s"].values())))
    return told


def table(summary: Summary) -> list[Section]:
    """Rows of the page's table: the models greedily and at temperature 1, then the baselines."""
    rows = policy_rows(summary)
    sampled = [
        Row(row.name, row.label, row.kind, row.estimates["temperature_1"])
        for row in rows
        if row.estimates.get("temperature_1")
    ]
    models = [row for row in rows if row.kind != "baseline"]
    sections = (
        ("greedy" if sampled else "", models),
        ("temperature 1", sampled),
        ("baselines", [row for row in rows if row.kind == "baseline"]),
    )
    return [
        {"title": title, "rows": [_table_row(row, columns(summary)) for row in members]}
        for title, members in sections
        if members
    ]


def _table_row(row: Row, shown: Sequence[Column]) -> Section:
    cells = []
    for column in shown:
        estimate = row.estimates.get(column.key) or {}
        low, high = estimate.get("ci95") or (None, None)
        interval = "" if low is None else f"{column.value(low)} to {column.value(high)}"
        cells.append({"mean": column.value(estimate.get("mean")), "interval": interval})
    return {"name": row.name, "label": row.label, "kind": row.kind, "cells": cells}


def policy_figures(summary: Summary) -> list[Section]:
    """All policies beside each other: by utility, and by accuracy and cost."""
    rows = policy_rows(summary)
    utility, accuracy, cost, *_ = columns(summary)
    if not rows:
        return []
    return [
        {
            "title": "Utility",
            "note": "Tasks solved, less cost and latency as the user weighs them, and the user's wishes.",
            "svg": Markup(plots.ranking(utility, rows)),
        },
        {
            "title": "Accuracy against cost",
            "note": "Up and to the left is better.",
            "svg": Markup(plots.scatter(cost, accuracy, rows)),
        },
    ]


def curves(metrics: Sequence[Json]) -> list[Section]:
    """A figure for every known metric that was logged at two steps or more, with the ends of its trend."""
    figures = []
    for column in _CURVES:
        by_step = {row["step"]: row[column.key] for row in metrics if _is_number(row.get(column.key))}
        if len(by_step) < 2:
            continue
        steps = np.array(sorted(by_step))
        values = np.array([by_step[step] for step in steps.tolist()], np.float64)
        ends = column.scale * plots.trend(values)[[0, -1]]
        figures.append(
            {
                "title": column.title,
                "unit": column.unit,
                "first": _short(ends[0]),
                "last": _short(ends[1]),
                "svg": Markup(plots.curve(column, steps, values)),
            }
        )
    return figures


def _short(number: float) -> str:
    return f"{number:.3g}".replace("-", "−")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def expert_shares(summary: Summary) -> dict[str, dict[str, float]]:
    """Shares of calls per expert: of the base, the trained model and the oracle, or of whoever there is."""
    shares = {row.name: row.estimates.get("expert_shares") or {} for row in policy_rows(summary)}
    shares = {name: share_of for name, share_of in shares.items() if share_of}
    return {name: shares[name] for name in ("base", "trained", "oracle") if name in shares} or shares


def expert_figures(shares: dict[str, dict[str, float]]) -> list[Section]:
    """A figure per function from `expert_shares`."""
    return [{"title": title, "svg": Markup(svg)} for title, svg in plots.expert_bars(shares)]


def step_parts(metrics: Sequence[Json]) -> dict[str, float]:
    """Median seconds of a step's parts; "rest" is what no part accounts for."""
    parts = {
        part: [row[key] for row in metrics if _is_number(row.get(key := f"time/{part}_s"))] for part in _STEP_PARTS
    }
    medians = {part: median(values) for part, values in parts.items() if values}
    whole = [row["time/step_s"] for row in metrics if _is_number(row.get("time/step_s"))]
    if not medians or not whole:
        return {}
    return medians | {"rest": max(0.0, median(whole) - sum(medians.values()))}


def bars(seconds: Mapping[str, float]) -> list[Section]:
    """Named durations with their share of the sum, for bars drawn by CSS."""
    total = sum(seconds.values()) or 1.0
    return [
        {"name": name.replace("_", " "), "duration": duration(value), "percent": 100 * value / total}
        for name, value in seconds.items()
    ]


def examples(records: Sequence[Json]) -> list[Section]:
    """A task of the first and of the last logged step with its best, a middling and its worst attempt."""
    steps = sorted({record["step"] for record in records})
    return [_example(step, [r for r in records if r["step"] == step]) for step in dict.fromkeys(steps[:1] + steps[-1:])]


def _example(step: int, records: Sequence[Json]) -> Section:
    def key(record: Json) -> str:
        return record["task_id"]

    groups = [list(group) for _, group in itertools.groupby(sorted(records, key=key), key)]
    # The group whose rewards differ most shows best what the step could learn from.
    group = max(groups, key=lambda g: max(r["reward"] for r in g) - min(r["reward"] for r in g))
    attempts: dict[str, dict[str, Any]] = {}
    for record in group:
        same = json.dumps([(turn["calls"], turn["text"]) for turn in record["turns"]])
        attempts.setdefault(same, {"record": record, "count": 0})["count"] += 1
    ordered = sorted(attempts.values(), key=lambda attempt: -attempt["record"]["reward"])
    picked = np.unique(np.linspace(0, len(ordered) - 1, _NUM_EXAMPLES).round().astype(int))
    return {
        "step": step,
        "task_id": group[0]["task_id"],
        "prompt": group[0]["prompt"],
        "preference": group[0]["preference"],
        "num_siblings": len(group),
        "num_different": len(ordered),
        "attempts": [ordered[index] for index in picked],
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, NOTHING if value is None else str(value)))
    return pairs
