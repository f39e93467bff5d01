"""Advantages against a slow float64 reading of their definitions, and their invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.rl.advantages import advantages, keeps_group

KINDS = ("grpo", "dr_grpo", "rloo")
reward_lists = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=16)
seeded = settings(derandomize=True, deadline=None)


def oracle(rewards: list[float], kind: str) -> list[float]:
    size = len(rewards)
    mean = sum(rewards) / size
    if kind == "dr_grpo":
        return [r - mean for r in rewards]
    if kind == "rloo":
        others = [rewards[:i] + rewards[i + 1 :] for i in range(size)]
        return [r - sum(rest) / len(rest) if rest else 0.0 for r, rest in zip(rewards, others, strict=True)]
    std = (sum((r - mean) ** 2 for r in rewards) / size) ** 0.5
    return [(r - mean) / (std + 1e-6) for r in rewards]


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=reward_lists)
@seeded
def test_matches_the_definition(kind, rewards):
    got = advantages(np.array(rewards, np.float32), kind, 1e9)
    # One rounding to float32, and the float64 noise of the oracle's mean, which grpo multiplies by up to 1e6.
    np.testing.assert_allclose(got, oracle(rewards, kind), rtol=2e-7, atol=1e-8)
    assert got.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=reward_lists, bound=st.floats(0.125, 3, width=32))
@seeded
def test_clip(kind, rewards, bound):
    rewards = np.array(rewards, np.float32)
    expected = np.clip(advantages(rewards, kind, 1e9), -bound, bound)
    np.testing.assert_array_equal(advantages(rewards, kind, bound), expected)


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=reward_lists)
@seeded
def test_sum_to_zero_unclipped(kind, rewards):
    got = advantages(np.array(rewards, np.float32), kind, 1e9).astype(np.float64)
    assert abs(got.sum()) <= 2**-24 * np.abs(got).sum() + 1e-8  # each advantage is rounded to float32 once


@pytest.mark.parametrize("kind", KINDS)
@given(steps=st.lists(st.integers(-64, 64), min_size=2, max_size=16), shift=st.integers(-64, 64))
@seeded
def test_a_shift_of_all_rewards_changes_nothing(kind, steps, shift):
    rewards = np.array(steps, np.float32) / 16  # sixteenths: the shift itself does not round
    moved = advantages(rewards + np.float32(shift / 16), kind, 1e9)
    np.testing.assert_allclose(moved, advantages(rewards, kind, 1e9), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@given(reward=st.floats(-1e6, 1e6, width=32), size=st.integers(1, 64))
@seeded
def test_equal_rewards_teach_exactly_nothing(kind, reward, size):
    rewards = np.full(size, reward, np.float32)
    assert not advantages(rewards, kind, 3.0).any()
    assert not keeps_group(rewards, 0.0)


def test_float32_noise_of_equal_rewards_would_be_amplified():
    rewards = np.full(7, 0.1, np.float32)
    assert rewards.std() > 0  # what the float64 arithmetic is for
    assert not advantages(rewards, "grpo", 3.0).any()


def test_keeps_groups_above_the_bound_only():
    rewards = np.array([0, 1], np.float32)  # std exactly 0.5
    assert keeps_group(rewards, 0.49)
    assert not keeps_group(rewards, 0.5)
