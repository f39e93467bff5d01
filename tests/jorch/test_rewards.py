"""score_group against a slow reading of the reward's definition, per trajectory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.rl.rewards import score_group
from jorch.sections import AlgorithmConfig, RewardConfig
from jorch.types import TERMINATIONS, Task, Trajectory

TOOLS = ("answer-1", "answer-2", "search-1")


def make_task(preference: dict[str, float]) -> Task:
    return Task("t", (), (), "experts", {}, preference, None, "math", "train")


trajectories = st.builds(
    Trajectory,
    task_id=st.just("t"),
    trajectory_id=st.just("t/0"),
    turns=st.just(()),
    termination=st.sampled_from([name for name in TERMINATIONS if name not in ("infra_error", "deadline")]),
    outcome=st.sampled_from([0.0, 1.0]),
    num_malformed=st.sampled_from([0, 0, 1]),
    cost_usd=st.sampled_from([0.0, 0.01, 0.03]),
    latency_s=st.floats(0, 30),
    tool_counts=st.dictionaries(st.sampled_from(TOOLS), st.integers(1, 3)),
)
preferences = st.fixed_dictionaries(
    {"outcome": st.floats(0, 3), "cost": st.floats(0, 1), "latency": st.floats(0, 1)},
    optional={name: st.floats(-1, 1) for name in TOOLS},
)


def oracle(preference: dict[str, float], group: list[Trajectory], invalid_reward: float) -> list[float]:
    def feature(name: str, trajectory: Trajectory) -> float:
        if name == "outcome":
            return trajectory.outcome
        if name in ("cost", "latency"):
            return -(trajectory.cost_usd if name == "cost" else trajectory.latency_s)
        return float(trajectory.tool_counts.get(name, 0))

    rewards = []
    for trajectory in group:
        if trajectory.num_malformed or trajectory.termination not in ("answered", "ended"):
            rewards.append(invalid_reward)
            continue
        total = 0.0
        for name, weight in preference.items():
            column = [feature(name, sibling) for sibling in group]
            if max(column) > min(column):
                total += weight * (feature(name, trajectory) - min(column)) / (max(column) - min(column))
        rewards.append(total if trajectory.outcome == 1 else 0.0)
    return rewards


@given(preference=preferences, group=st.lists(trajectories, min_size=1, max_size=8))
@settings(derandomize=True, deadline=None)
def test_matches_the_definition(preference, group):
    scored = score_group(make_task(preference), group, RewardConfig(invalid_reward=-0.25), AlgorithmConfig())
    # Sums of at most six float64 terms below 3, then one rounding to float32.
    np.testing.assert_allclose(scored.rewards, oracle(preference, group, -0.25), rtol=1e-6, atol=1e-7)
    assert scored.rewards.dtype == scored.advantages.dtype == np.float32
    assert scored.trajectories == tuple(group)


@pytest.mark.parametrize(("kind", "expected"), [("grpo", 1.0), ("dr_grpo", 0.5), ("rloo", 1.0)])
def test_advantages_follow_the_config(kind, expected):
    group = [
        Trajectory("t", str(i), (), "answered", float(outcome), 0, 0.0, 0.0, {}) for i, outcome in enumerate([1, 0])
    ]
    algorithm = AlgorithmConfig(advantage=kind, max_abs_advantage=2.0)
    scored = score_group(make_task({"outcome": 1.0}), group, RewardConfig(), algorithm)
    np.testing.assert_allclose(scored.advantages, [expected, -expected], rtol=1e-5)
    clipped = score_group(
        make_task({"outcome": 1.0}),
        group,
        RewardConfig(),
        algorithm.model_copy(update={"max_abs_advantage": 0.25}),
    )
    np.testing.assert_array_equal(clipped.advantages, np.float32([0.25, -0.25]))


def test_infrastructure_failures_are_the_callers_to_leave_out():
    lost = Trajectory("t", "t/0", (), "infra_error", 0.0, 0, 0.0, 0.0, {})
    with pytest.raises(AssertionError):
        score_group(make_task({"outcome": 1.0}), [lost], RewardConfig(), AlgorithmConfig())
