import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools_server.config import ServerConfig
from tools_server.environment import Observation
from tools_server.envs.experts import ExpertsEnvironment
from tools_server.ledger import Ledger
from tools_server.rewards import group_rewards

TOOLS = ("answer-1", "answer-2", "search-1")
INVALID_REWARD = -0.25


def oracle(outcomes, costs, latencies, counts, valid, preference, invalid_reward):
    """The paper's formula as matrices in float64: a row per trajectory, a column per weighed feature."""
    features = np.zeros((len(outcomes), len(preference)), np.float64)
    for column, name in enumerate(preference):
        for row in range(len(outcomes)):
            tools = {**counts[row], "outcome": outcomes[row], "cost": -costs[row], "latency": -latencies[row]}
            features[row, column] = tools.get(name, 0)
    span = np.ptp(features, axis=0)
    normalised = np.where(span > 0, (features - features.min(axis=0)) / np.where(span > 0, span, 1), 0)
    rewards = normalised @ np.array(list(preference.values()), np.float64)
    return np.where(valid, np.where(np.array(outcomes) >= 1, rewards, 0), invalid_reward)


amounts = st.integers(0, 1000).map(float)
weights = st.floats(-3, 3, allow_subnormal=False)


@st.composite
def groups(draw, min_size=1):
    size = draw(st.integers(min_size, 8))

    def column(values):
        return draw(st.lists(values, min_size=size, max_size=size))

    return {
        "outcomes": column(st.sampled_from([0.0, 0.5, 1.0])),
        "costs_usd": column(amounts),
        "latencies_s": column(amounts),
        "tool_counts": column(st.dictionaries(st.sampled_from(TOOLS), st.integers(0, 5))),
        "valid": column(st.booleans()),
        "preference": draw(st.dictionaries(st.sampled_from((*TOOLS, "outcome", "cost", "latency")), weights)),
        "invalid_reward": INVALID_REWARD,
    }


def solved_group(**features):
    size = len(next(iter(features.values())))
    group = {
        "outcomes": [1.0] * size,
        "costs_usd": [0.0] * size,
        "latencies_s": [0.0] * size,
        "tool_counts": [{}] * size,
        "valid": [True] * size,
        "invalid_reward": INVALID_REWARD,
    }
    return group | features


@given(groups())
def test_agrees_with_the_float64_oracle(group):
    np.testing.assert_allclose(group_rewards(**group), oracle(*group.values()), rtol=0, atol=1e-12)


@given(groups())
def test_is_bounded_by_the_weights(group):
    bound = sum(map(abs, group["preference"].values())) + 1e-9
    for reward, outcome, valid in zip(group_rewards(**group), group["outcomes"], group["valid"], strict=True):
        if not valid:
            assert reward == INVALID_REWARD
        elif outcome < 1:
            assert reward == 0.0
        else:
            assert abs(reward) <= bound


@given(groups(), st.randoms(use_true_random=False))
def test_permuting_siblings_permutes_rewards(group, random):
    order = list(range(len(group["outcomes"])))
    random.shuffle(order)
    shuffled = {
        name: [values[i] for i in order] if isinstance(values, list) else values for name, values in group.items()
    }
    rewards = group_rewards(**group)
    assert group_rewards(**shuffled) == [rewards[i] for i in order]


@given(groups(), st.integers(-6, 6), st.integers(0, 1000))
def test_scaling_or_shifting_costs_changes_nothing(group, exponent, shift):
    """Powers of two and small integers, so that the scaled costs are exact."""
    moved = [cost * 2.0**exponent + shift for cost in group["costs_usd"]]
    assert group_rewards(**group) == group_rewards(**group | {"costs_usd": moved})


@given(groups(min_size=2), st.floats(0.01, 3), st.data())
def test_a_cheaper_trajectory_is_never_worse(group, weight, data):
    group["preference"]["cost"] = weight
    i = data.draw(st.integers(0, len(group["outcomes"]) - 1))
    cheaper = list(group["costs_usd"])
    cheaper[i] = data.draw(st.integers(0, int(cheaper[i])).map(float))
    assert group_rewards(**group | {"costs_usd": cheaper})[i] >= group_rewards(**group)[i] - 1e-12


def test_error_1_of_the_released_code_dearer_and_slower_score_higher():
    group = solved_group(costs_usd=[0.1, 0.2, 0.3], latencies_s=[9.0, 5.0, 1.0])
    assert group_rewards(**group, preference={"cost": 1.0}) == pytest.approx([1.0, 0.5, 0.0])
    assert group_rewards(**group, preference={"latency": 1.0}) == pytest.approx([0.0, 0.5, 1.0])


def test_error_2_of_the_released_code_unbounded_where_costs_are_close():
    group = solved_group(costs_usd=[0.1, 0.1001, 0.1002, 0.1003])
    rewards = group_rewards(**group, preference={"cost": 0.1})
    assert max(map(abs, rewards)) == pytest.approx(0.1)


def test_error_3_of_the_released_code_non_callers_ignored():
    counts = [{"search-1": 1}] * 3 + [{"answer-1": 1}, {}]
    group = solved_group(tool_counts=counts)
    assert group_rewards(**group, preference={"search-1": 0.5}) == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert group_rewards(**group, preference={"search-1": -0.5}) == [-0.5, -0.5, -0.5, 0.0, 0.0]


def play(config, *turns):
    """Outcome and bill of a session; a turn is a sequence of (function, alias)."""
    setup = {
        "model_mapping": {"search-1": "cheap", "answer-1": "cheap", "answer-2": "dear"},
        "simulation": {"difficulty": 1, "needs": ["search"]},
    }
    environment, ledger = ExpertsEnvironment(setup, 0, config), Ledger()
    for turn in turns:
        for function, alias in turn:
            ledger.charge(environment.call(function, {"model": alias}))
    return environment.outcome(), ledger


@pytest.fixture
def config():
    cheap = {"kind": "simulated", "skill": {"default": 1}, "tokens_per_call": 1000}
    cheap |= {"usd_per_million_tokens": 1.0, "latency_s": 2.0}
    dear = cheap | {"usd_per_million_tokens": 5.0, "latency_s": 9.0}
    return ServerConfig.model_validate({"experts": {"cheap": cheap, "dear": dear}})


def test_error_4_of_the_released_code_the_terminal_call_is_free(config):
    outcomes, bills = zip(
        *[play(config, [("search", "search-1")], [("answer", answer)]) for answer in ("answer-1", "answer-2")],
        strict=True,
    )
    assert [bill.cost_usd for bill in bills] == pytest.approx([0.002, 0.006])
    assert [bill.tool_counts for bill in bills] == [
        {"search-1": 1, "answer-1": 1},
        {"search-1": 1, "answer-2": 1},
    ]
    group = solved_group(outcomes=outcomes, costs_usd=[bill.cost_usd for bill in bills])
    assert group_rewards(**group, preference={"cost": 1.0}) == [1.0, 0.0]


def test_error_5_of_the_released_code_only_the_first_tool_of_a_turn_takes_time(config):
    outcome, bill = play(config, [("search", "search-1"), ("answer", "answer-2")])
    assert outcome == 1.0
    assert bill.latency_s == pytest.approx(2.0 + 9.0)
    assert bill.tool_counts == {"search-1": 1, "answer-2": 1}


def test_a_failed_tool_is_billed_and_a_refused_call_is_not():
    ledger = Ledger()
    ledger.charge(Observation("search-1", "none", 0.25, 1.5, "tool_error"))
    ledger.charge(Observation("search-1", "repeated", error="repeated_call", ended=True))
    ledger.charge(Observation("serch", "unknown tool", error="unknown_tool"))
    ledger.charge(Observation("", "bye", ended=True))
    assert (ledger.cost_usd, ledger.latency_s, ledger.tool_counts) == (0.25, 1.5, {"search-1": 1})


def test_an_empty_group_and_a_group_of_one_have_no_signal():
    assert group_rewards([], [], [], [], [], {"cost": 1.0}, INVALID_REWARD) == []
    [reward] = group_rewards(**solved_group(costs_usd=[0.3]), preference={"cost": 1.0, "outcome": 1.0})
    assert reward == 0.0
    assert math.copysign(1, reward) == 1
