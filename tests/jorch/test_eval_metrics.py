"""Utility, followed preferences and intervals: worked examples, published values, coverage."""

import itertools
import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jorch.evals.metrics import summarise, wilson_interval
from jorch.rollout.outcomes import EvalRow, row_from
from jorch.synth.miniature import make_task
from jorch.types import Task

EXPERTS = {
    "search-1": {
        "function": "search",
        "skill": 1,
        "usd_per_million_tokens": 1.0,
        "cost_usd": 0.001,
        "latency_s": 5.0,
    },
    "search-2": {
        "function": "search",
        "skill": 2,
        "usd_per_million_tokens": 2.0,
        "cost_usd": 0.002,
        "latency_s": 4.0,
    },
    "search-3": {
        "function": "search",
        "skill": 3,
        "usd_per_million_tokens": 2.0,
        "cost_usd": 0.002,
        "latency_s": 1.0,
    },
    "answer-1": {
        "function": "answer",
        "skill": 2,
        "usd_per_million_tokens": 2.0,
        "cost_usd": 0.004,
        "latency_s": 2.0,
    },
    "answer-2": {
        "function": "answer",
        "skill": 3,
        "usd_per_million_tokens": 5.0,
        "cost_usd": 0.010,
        "latency_s": 1.0,
    },
    "answer-3": {
        "function": "answer",
        "skill": 3,
        "usd_per_million_tokens": 3.0,
        "cost_usd": 0.006,
        "latency_s": 3.0,
    },
}
TRUTH: dict[str, Any] = {
    "kind": "none",
    "subject": None,
    "needs": ["search"],
    "capable": {"search": ["search-2", "search-3"], "answer": ["answer-1", "answer-2", "answer-3"]},
    "experts": EXPERTS,
    "max_cost_usd": 0.02,
    "max_latency_s": 15.0,
}
TASK = Task("t", (), (), "experts", {}, {"outcome": 1.0, "cost": 0.6, "latency": 0.1}, None, "math", "heldout", TRUTH)


def of_kind(kind: str, subject: str | None = None, weight: float = 0.0) -> Task:
    preference = TASK.preference | ({subject: weight} if subject else {})
    return replace(TASK, preference=preference, truth=TRUTH | {"kind": kind, "subject": subject})


def play(task: Task, *aliases: str, outcome: float = 1.0) -> EvalRow:
    cost_usd = sum(EXPERTS[alias]["cost_usd"] for alias in aliases)
    latency_s = sum(EXPERTS[alias]["latency_s"] for alias in aliases)
    return row_from(task, outcome, cost_usd, latency_s, {a: 1 for a in aliases}, True, "answered")


def test_utility_of_worked_examples() -> None:
    plain = play(TASK, "search-2", "answer-1")
    assert plain.utility == pytest.approx(1 - 0.6 * 0.006 / 0.02 - 0.1 * 6 / 15)
    assert play(TASK, "search-2", "answer-1", outcome=0.0).utility == 0
    avoid = of_kind("avoid", "answer-1", -0.5)
    assert play(avoid, "search-2", "answer-1").utility == pytest.approx(plain.utility - 0.5)
    assert play(avoid, "search-2", "answer-2").utility == play(TASK, "search-2", "answer-2").utility
    prefer = of_kind("prefer", "answer-1", 0.5)
    assert play(prefer, "search-2", "answer-1").utility == pytest.approx(plain.utility + 0.5)


@pytest.mark.parametrize(
    ("kind", "aliases", "followed"),
    [
        ("cheap", ("search-2", "answer-1"), 1),
        ("cheap", ("search-3", "answer-1"), 1),  # the price ties
        ("cheap", ("search-2", "answer-3"), 0),
        ("cheap", ("search-2", "search-3", "answer-1"), 0),  # a call too many
        ("cheap", ("answer-1",), 0),  # a call too few
        ("fast", ("search-3", "answer-2"), 1),
        ("fast", ("search-2", "answer-2"), 0),
        ("fast", ("search-3", "answer-1"), 0),
    ],
)
def test_followed_cheap_and_fast(kind: str, aliases: tuple[str, ...], followed: float) -> None:
    assert play(of_kind(kind), *aliases).followed == followed
    assert play(of_kind(kind), *aliases, outcome=0.0).followed == 0


def test_followed_compares_with_capable_experts_only() -> None:
    # search-1 is the cheapest of all, but cannot solve the task.
    assert play(of_kind("cheap"), "search-2", "answer-1").followed == 1


def test_followed_avoid_prefer_and_none() -> None:
    for aliases in itertools.product(("search-2", "search-3"), ("answer-1", "answer-2")):
        calls = float("answer-2" in aliases)
        assert play(of_kind("avoid", "answer-2", -0.5), *aliases).followed == 1 - calls
        assert play(of_kind("prefer", "answer-2", 0.5), *aliases).followed == calls
        assert play(TASK, *aliases).followed is None
    assert play(of_kind("avoid", "answer-2", -0.5), "answer-1", outcome=0.0).followed == 0


def test_row_counts_experts_by_function_and_skill() -> None:
    row = play(TASK, "search-2", "search-3", "answer-2", "answer-3")
    assert row.expert_counts == {"search skill 2": 1, "search skill 3": 1, "answer skill 3": 2}


def test_row_without_miniature_truth() -> None:
    task = replace(TASK, truth={}, preference={"outcome": 1.0})
    row = row_from(task, 1.0, 0.4, 30.0, {"get_user": 2, "book": 1}, False, "max_turns")
    assert row == EvalRow("t", 1.0, 1.0, 0.4, 30.0, None, 0.0, {"get_user": 2, "book": 1}, "max_turns")


@given(st.integers(0, 10**6), st.booleans(), st.data())
def test_utility_never_depends_on_how_calls_are_billed_together(seed: int, heldout: bool, data: st.DataObject) -> None:
    """Float64 oracle: one term per call, as a sum over the plan."""
    task = make_task(random.Random(seed), heldout, "t", "heldout")
    experts, weights = task.truth["experts"], task.preference
    plan = data.draw(st.lists(st.sampled_from(sorted(experts)), min_size=1, max_size=5, unique=True))
    cost_usd = math.fsum(experts[a]["cost_usd"] for a in plan)
    latency_s = math.fsum(experts[a]["latency_s"] for a in plan)
    row = row_from(task, 1.0, cost_usd, latency_s, dict.fromkeys(plan, 1), True, "answered")
    terms = [
        -weights["cost"] * experts[a]["cost_usd"] / 0.020
        - weights["latency"] * experts[a]["latency_s"] / 15.0
        + {"avoid": -0.5, "prefer": 0.5}.get(task.truth["kind"], 0.0) * (a == task.truth["subject"])
        for a in plan
    ]
    assert row.utility == pytest.approx(1 + math.fsum(terms), abs=1e-12)


@pytest.mark.parametrize(
    ("solved", "count", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_published_intervals(solved: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(solved / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_wilson_contains_the_mean_within_zero_and_one(count: int, mean: float) -> None:
    low, high = wilson_interval(mean, count)
    assert 0 <= low <= mean <= high <= 1
    mirrored = wilson_interval(1 - mean, count)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_covers_the_truth() -> None:
    """Exactly, by the binomial's probabilities: 95 % on average over the truth, and never far below."""
    count = 100
    inside = [wilson_interval(k / count, count) for k in range(count + 1)]
    choose = [math.comb(count, k) for k in range(count + 1)]
    coverage = [
        sum(choose[k] * p**k * (1 - p) ** (count - k) for k in range(count + 1) if inside[k][0] <= p <= inside[k][1])
        for p in np.linspace(0.05, 0.95, 181)
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.91


def rows_from(cost_usd: np.ndarray, solved: np.ndarray) -> list[EvalRow]:
    return [
        EvalRow(str(i), s - 20 * c, s, c, 1.0, None, 1.0, {}, "answered")
        for i, (c, s) in enumerate(zip(cost_usd.tolist(), solved.tolist(), strict=True))
    ]


def test_intervals_of_means_and_ratios_cover_the_truth() -> None:
    """Skewed costs that depend on success; of 600 samples the coverage's standard error is 0.9 points."""
    rng, count = np.random.default_rng(0), 150
    truth = {"cost_usd": 0.01 * (0.8 + 2 * 0.2), "utility": 0.8 - 0.24, "cost_per_solved_usd": 0.012 / 0.8}
    hits = dict.fromkeys(truth, 0)
    for _ in range(600):
        solved = (rng.random(count) < 0.8).astype(float)
        summary = summarise(rows_from(rng.exponential(0.01 * (2 - solved)), solved))
        for key, value in truth.items():
            low, high = summary[key]["ci95"]
            hits[key] += low <= value <= high
    for key, hit in hits.items():
        assert hit / 600 == pytest.approx(0.95, abs=0.03), key


def test_summary_of_a_small_sample() -> None:
    rows = [
        EvalRow("a", 0.5, 1.0, 0.010, 4.0, 1.0, 1.0, {"search skill 1": 1, "answer skill 3": 1}, "answered"),
        EvalRow("b", 0.0, 0.0, 0.020, 6.0, None, 0.0, {"answer skill 3": 2}, "invalid"),
        EvalRow("c", 0.7, 1.0, 0.006, 8.0, 0.0, 1.0, {}, "answered"),
    ]
    summary = summarise(rows)
    assert summary["num_tasks"] == 3
    assert summary["utility"]["mean"] == pytest.approx(0.4)
    half = 1.959964 * np.std([0.5, 0.0, 0.7], ddof=1) / np.sqrt(3)
    assert summary["utility"]["ci95"] == pytest.approx([0.4 - half, 0.4 + half], abs=1e-6)
    assert summary["accuracy"]["ci95"] == pytest.approx(wilson_interval(2 / 3, 3))
    assert summary["preference_followed"]["ci95"] == pytest.approx(wilson_interval(1 / 2, 2))
    assert summary["format_valid"]["mean"] == pytest.approx(2 / 3)
    assert summary["latency_s"]["mean"] == pytest.approx(6.0)
    assert summary["cost_per_solved_usd"]["mean"] == pytest.approx(0.018)
    assert summary["expert_shares"] == {"answer skill 3": 0.75, "search skill 1": 0.25}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summary_says_none_where_nothing_counts() -> None:
    nothing = {"mean": None, "ci95": [None, None]}
    failed = summarise([EvalRow("a", 0.0, 0.0, 0.01, 1.0, None, 1.0, {}, "max_turns")])
    assert failed["preference_followed"] == nothing
    assert failed["cost_per_solved_usd"] == nothing
    assert failed["cost_usd"] == {"mean": 0.01, "ci95": [None, None]}
    assert failed["expert_shares"] == {}
    empty = summarise([])
    assert empty["num_tasks"] == 0
    assert empty["utility"] == empty["accuracy"] == nothing
