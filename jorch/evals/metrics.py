"""The summary of many played tasks: means with 95 % intervals. Pure; numpy only.

Flow: the harness and the baselines turn every played task into an EvalRow; `summarise` turns rows into the
entries of summary.json that `tables.py` and `report.py` show.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jorch.rollout.outcomes import EvalRow

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""

Estimate = dict[str, Any]
"""{"mean": float or None where nothing counts, "ci95": [low, high], each None where it cannot be told}."""


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion `mean` of `count` trials.

    Conservative where the values are fractions, since no values in [0, 1] spread more than zeros and ones.
    """
    shrink = 1 + Z_95**2 / count
    centre = (mean + Z_95**2 / (2 * count)) / shrink
    half = Z_95 * math.sqrt(mean * (1 - mean) / count + (Z_95 / (2 * count)) ** 2) / shrink
    # At 0 and 1 the interval ends exactly there; rounding must not push the mean out of it.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def _proportion(values: Sequence[float]) -> Estimate:
    if not values:
        return {"mean": None, "ci95": [None, None]}
    mean = float(np.mean(values))
    return {"mean": mean, "ci95": list(wilson_interval(mean, len(values)))}


def _normal(mean: float, deviations: np.ndarray) -> Estimate:
    """Normal interval of an estimate whose error is the mean of `deviations` (f64[n], about zero)."""
    count = len(deviations)
    if count < 2:
        return {"mean": mean, "ci95": [None, None]}
    half = Z_95 * math.sqrt(float(np.sum(deviations**2)) / (count - 1) / count)
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def _mean(values: Sequence[float]) -> Estimate:
    if not values:
        return {"mean": None, "ci95": [None, None]}
    array = np.asarray(values, np.float64)
    return _normal(float(array.mean()), array - array.mean())


def _cost_per_solved(rows: Sequence[EvalRow]) -> Estimate:
    """All cost over all outcomes, with the delta method's interval of a ratio of means."""
    cost_usd = np.array([row.cost_usd for row in rows], np.float64)
    outcome = np.array([row.accuracy for row in rows], np.float64)
    if not outcome.sum():
        return {"mean": None, "ci95": [None, None]}
    ratio = float(cost_usd.sum() / outcome.sum())
    return _normal(ratio, (cost_usd - ratio * outcome) / outcome.mean())


def summarise(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """Means with 95 % intervals: Wilson's for proportions, the normal one for the rest.

    Returns {metric: Estimate, "num_tasks", "expert_shares": {expert: share of all calls}}. A metric for which
    no row counts, such as the cost per solved task where none was solved, has mean None.
    """
    calls: Counter[str] = Counter()
    for row in rows:
        calls.update(row.expert_counts)
    num_calls = calls.total()
    return {
        "utility": _mean([row.utility for row in rows]),
        "accuracy": _proportion([row.accuracy for row in rows]),
        "cost_usd": _mean([row.cost_usd for row in rows]),
        "latency_s": _mean([row.latency_s for row in rows]),
        "preference_followed": _proportion([row.followed for row in rows if row.followed is not None]),
        "format_valid": _proportion([row.format_valid for row in rows]),
        "cost_per_solved_usd": _cost_per_solved(rows),
        "num_tasks": len(rows),
        "expert_shares": {name: calls[name] / num_calls for name in sorted(calls) if calls[name]},
    }
