"""The group reward, defined once (paper section 3). Pure, standard library only.

Used by `jorch.rl.rewards` and, over HTTP, by `reward_groups.py`.

Every trajectory tau has features M(tau) = [calls per tool ..., outcome, -cost, -latency]. Each feature is
min-max normalised within the group of trajectories of one task, a constant feature counts 0, and

    R(tau) = M_norm(tau) . P   if tau solved the task,   0 otherwise,

where P is the task's preference. Two extensions of the paper: weights may be negative (avoid; the paper has
P in [0, 1]), and a malformed or cut-off trajectory gets `invalid_reward` in place of 0.

The released code's arithmetic differs from the paper in five ways, none of which is ported:
1. It takes min and max of -cost but normalises +cost, so that dearer scores higher. Here signs are applied
   once, when features are made, and one function normalises them all.
2. Cost and latency also pass its loop over tools, with count 0, which is unbounded where a group's costs
   are close. Here a feature enters once, and each normalised one is in [0, 1]: |R| <= sum |P|.
3. Its minimum of a tool's count ignores trajectories that never called it. Here they count 0.
4. Its terminal call is recorded nowhere. Here costs, latencies and counts are sums over all calls, the
   terminal one included; `ledger.py` bills it like any other.
5. Its latency leaves out the orchestrator's own generation, contains the sleeps between retries, and counts
   only the first tool of a turn. Here the caller passes complete sums: every call of every turn, and
   generation as modelled.
"""

from collections.abc import Iterable, Mapping, Sequence


def group_rewards(
    outcomes: Sequence[float],
    costs_usd: Sequence[float],
    latencies_s: Sequence[float],
    tool_counts: Sequence[Mapping[str, int]],
    valid: Sequence[bool],
    preference: Mapping[str, float],
    invalid_reward: float,
) -> list[float]:
    """Rewards of the sibling trajectories of one task, in their order; all sequences have one entry for each.

    Args:
        outcomes: in [0, 1]; solved means >= 1.
        tool_counts: calls per billed tool name; a name that is absent counts 0.
        valid: well-formed and judged by its environment. The others get `invalid_reward` but stay in the group's
            minima and maxima.
        preference: weight per feature: "outcome", "cost", "latency" (names that no tool may have), or a tool.
    """
    features = group_features(outcomes, costs_usd, latencies_s, tool_counts, preference)
    assert len(valid) == len(features)
    rewards = [0.0] * len(features)
    for i, own in enumerate(features):
        for name, value in own.items():
            rewards[i] += preference[name] * value  # not `sum`, whose rounding depends on Python's version
    return [
        (reward if outcome >= 1 else 0.0) if is_valid else invalid_reward
        for reward, outcome, is_valid in zip(rewards, outcomes, valid, strict=True)
    ]


def group_features(
    outcomes: Sequence[float],
    costs_usd: Sequence[float],
    latencies_s: Sequence[float],
    tool_counts: Sequence[Mapping[str, int]],
    preference: Iterable[str],
) -> list[dict[str, float]]:
    """M_norm of each trajectory, each feature of the preference in [0, 1]; arguments as of `group_rewards`."""
    size = len(outcomes)
    assert all(len(values) == size for values in (costs_usd, latencies_s, tool_counts))
    signed: dict[str, Sequence[float]] = {
        "outcome": outcomes,
        "cost": [-cost for cost in costs_usd],
        "latency": [-latency for latency in latencies_s],
    }
    features: list[dict[str, float]] = [{} for _ in outcomes]
    for name in preference:
        values = signed.get(name)
        if values is None:
            values = [counts.get(name, 0) for counts in tool_counts]
        for own, value in zip(features, _min_max(values), strict=True):
            own[name] = value
    return features


def _min_max(values: Sequence[float]) -> list[float]:
    """`values` scaled to [0, 1] over the group; zeros where all are equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        return [0.0] * len(values)
    return [(value - low) / (high - low) for value in values]
