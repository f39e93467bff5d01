"""Trajectories of one task -> a scored Group. The bridge to the reward, which `tools_server` defines once."""

from collections.abc import Sequence

import numpy as np

from jorch.rl.advantages import advantages
from jorch.sections import AlgorithmConfig, RewardConfig
from jorch.types import Group, Task, Trajectory
from tools_server.rewards import group_rewards


def is_scorable(siblings: Sequence[Trajectory]) -> bool:
    """Whether at least half of a group's siblings, and two, are there: fewer say too little about each other."""
    num_present = sum(not t.lost for t in siblings)
    return num_present >= max(2, len(siblings) / 2)


def score_group(
    task: Task, trajectories: Sequence[Trajectory], reward: RewardConfig, algorithm: AlgorithmConfig
) -> Group:
    """The Group of sibling `trajectories` (>= 1) with rewards and advantages, f32[g] each.

    A malformed or unjudged (cut off) trajectory gets `reward.invalid_reward`. Siblings lost to the infrastructure
    say nothing about the policy: the caller leaves them out.
    """
    assert trajectories, f"task {task.task_id}: no trajectories to score"
    assert not any(t.lost for t in trajectories), task.task_id
    rewards = np.array(
        group_rewards(
            [t.outcome for t in trajectories],
            [t.cost_usd for t in trajectories],
            [t.latency_s for t in trajectories],
            [t.tool_counts for t in trajectories],
            [t.format_valid and t.judged for t in trajectories],
            task.preference,
            reward.invalid_reward,
        ),
        np.float32,
    )
    gains = advantages(rewards, algorithm.advantage, algorithm.max_abs_advantage)
    return Group(task, tuple(trajectories), rewards, gains)
