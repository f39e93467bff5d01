"""Each sampled token is trained exactly once, after exactly the tokens that it was drawn after."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jorch.rl.samples import from_group, from_trajectory, merge_copies
from jorch.sections import AlgorithmConfig
from jorch.types import Completion, Group, Sample, Task, Trajectory, Turn

TASK = Task("t", (), (), "experts", {}, {"outcome": 1.0}, None, "math", "train")
KEEP_ALL = AlgorithmConfig(drop_invalid=False, drop_unanswered=False)
tokens = st.lists(st.integers(0, 2), max_size=3)
# (starts afresh, what it observes, what it samples); few token values, so that accidental prefixes happen.
turn_specs = st.lists(st.tuples(st.booleans(), tokens, tokens), max_size=4)


def make_turn(prompt: list[int], sampled: list[int], version: int = 0) -> Turn:
    logprobs = np.array([-0.1 * (i + 1) - 0.01 * token for i, token in enumerate(sampled)], np.float32)
    completion = Completion(np.array(sampled, np.int32), logprobs, "stop", version + np.arange(len(sampled)))
    return Turn(np.array(prompt, np.int32), completion, (), ())


def make_trajectory(specs, termination="answered", num_malformed=0) -> Trajectory:
    turns, so_far = [], [7]
    for afresh, observed, sampled in specs:
        prompt = [7, *observed] if afresh else so_far + observed
        turns.append(make_turn(prompt, sampled))
        so_far = prompt + sampled
    return Trajectory("t", "t/0", tuple(turns), termination, 1.0, num_malformed, 0.0, 0.0, {})


def make_group(trajectories, advantages) -> Group:
    advantages = np.array(advantages, np.float32)
    return Group(TASK, tuple(trajectories), advantages, advantages)


def trained(samples) -> Counter:
    """(tokens before, token, logprob, advantage) of each trained token -> copies."""
    found = Counter()
    for sample in samples:
        ids = sample.token_ids.tolist()
        for i in np.flatnonzero(sample.loss_mask):
            key = (tuple(ids[:i]), ids[i], float(sample.logprobs[i]), sample.advantage)
            found[key] += sample.num_copies
    return found


def drawn(group: Group) -> Counter:
    """The same, read off the trajectories."""
    found = Counter()
    for trajectory, advantage in zip(group.trajectories, group.advantages, strict=True):
        for turn in trajectory.turns:
            ids = turn.prompt_token_ids.tolist()
            for token, logprob in zip(turn.completion.token_ids, turn.completion.logprobs, strict=True):
                found[(tuple(ids), int(token), float(logprob), float(advantage))] += 1
                ids.append(int(token))
    return found


@given(group=st.lists(st.tuples(turn_specs, st.sampled_from([-1.0, 0.0, 0.5])), max_size=4))
@settings(derandomize=True, deadline=None)
def test_every_sampled_token_is_trained_once_in_its_context(group):
    group = make_group([make_trajectory(specs) for specs, _ in group], [advantage for _, advantage in group])
    samples = from_group(group, KEEP_ALL)
    assert trained(samples) == drawn(group)
    for sample in samples:
        assert sample.loss_mask.any()
        assert not sample.loss_mask[0]
        assert not sample.logprobs[~sample.loss_mask].any()
        assert (sample.token_ids.dtype, sample.logprobs.dtype) == (np.int32, np.float32)


@given(specs=turn_specs)
@settings(derandomize=True, deadline=None)
def test_turns_fork_only_where_the_prompt_does_not_extend(specs):
    trajectory = make_trajectory(specs)
    sequences, so_far = [], None
    for turn in trajectory.turns:
        prompt = turn.prompt_token_ids.tolist()
        if so_far is None or prompt[: len(so_far)] != so_far:
            sequences.append(0)
        so_far = prompt + turn.completion.token_ids.tolist()
        sequences[-1] += len(turn.completion.token_ids)
    assert len(list(from_trajectory(trajectory, 1.0))) == sum(1 for num_sampled in sequences if num_sampled)


def test_docstring_example():
    turns = (make_turn([5, 6], [9, 2]), make_turn([5, 6, 9, 2, 8], [9, 2]))
    trajectory = Trajectory("t", "t/0", turns, "answered", 1.0, 0, 0.0, 0.0, {})
    (sample,) = from_trajectory(trajectory, 0.7)
    assert sample.token_ids.tolist() == [5, 6, 9, 2, 8, 9, 2]
    assert sample.loss_mask.tolist() == [False, False, True, True, False, True, True]
    assert sample.advantage == 0.7


def test_a_prompt_that_lost_a_sampled_token_forks():
    turns = (make_turn([5, 6], [9, 2]), make_turn([5, 6, 9], [2]))
    trajectory = Trajectory("t", "t/0", turns, "answered", 1.0, 0, 0.0, 0.0, {})
    assert [s.token_ids.tolist() for s in from_trajectory(trajectory, 1.0)] == [[5, 6, 9, 2], [5, 6, 9, 2]]


@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("drop_unanswered", [False, True])
def test_filters(drop_invalid, drop_unanswered):
    kinds = {
        "good": ("answered", 0),
        "malformed": ("answered", 1),
        "lost": ("max_turns", 0),
        "invalid": ("invalid", 0),
        "ended": ("ended", 0),
    }
    group = make_group(
        [make_trajectory([(False, [i], [1])], *kind) for i, kind in enumerate(kinds.values())], [1, 1, 1, 1, 1]
    )
    algorithm = AlgorithmConfig(drop_invalid=drop_invalid, drop_unanswered=drop_unanswered)
    kept = {list(kinds)[sample.token_ids[1]] for sample in from_group(group, algorithm)}
    dropped = {"malformed", "invalid"} if drop_invalid else set()
    dropped |= {"lost", "invalid"} if drop_unanswered else set()
    assert kept == set(kinds) - dropped


def make_sample(ids, logprob=-0.5, advantage=1.0, trained_from=1) -> Sample:
    mask = np.arange(len(ids)) >= trained_from
    return Sample(np.array(ids, np.int32), mask, np.where(mask, logprob, 0).astype(np.float32), advantage)


def test_identical_siblings_merge_and_others_do_not():
    alike = [make_sample([1, 2, 3]) for _ in range(3)]
    others = [
        make_sample([1, 2, 4]),
        make_sample([1, 2, 3], advantage=-1.0),
        make_sample([8, 9, 9], logprob=0.0, trained_from=1),
        make_sample([8, 9, 9], logprob=0.0, trained_from=2),
        make_sample([1, 2, 3], logprob=-0.6),  # other weights sampled it
    ]
    merged = merge_copies([alike[0], *others, *alike[1:]])
    assert sorted(sample.num_copies for sample in merged) == [1, 1, 1, 1, 1, 3]
    assert {id(sample) for sample in merged if sample.num_copies == 1} == set(map(id, others))


def test_noise_between_batch_slots_still_merges():
    (merged,) = merge_copies([make_sample([1, 2, 3], logprob=-0.5), make_sample([1, 2, 3], logprob=-0.500001)])
    assert merged.num_copies == 2


def test_every_sampled_token_keeps_the_version_of_its_weights():
    first, second = make_turn([7, 5], [1, 2], version=3), make_turn([7, 5, 1, 2, 6], [0], version=8)
    trajectory = Trajectory("t", "t/0", (first, second), "answered", 1.0, 0, 0.0, 0.0, {})
    (sample,) = from_trajectory(trajectory, 1.0)
    assert sample.policy_versions.tolist() == [-1, -1, 3, 4, -1, 8]
    assert (trajectory.policy_version_min, trajectory.policy_version_max) == (3, 8)


def test_copies_by_other_weights_stay_apart():
    same, other = (make_turn([7], [1], version) for version in (0, 1))
    made = [Trajectory("t", "t/0", (turn,), "answered", 1.0, 0, 0.0, 0.0, {}) for turn in (same, same, other)]
    assert [s.num_copies for s in from_group(make_group(made, [1, 1, 1]), KEEP_ALL)] == [2, 1]
