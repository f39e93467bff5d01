"""Scored trajectories -> token sequences to train on; then `data/packing.py` takes over. Pure numpy."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jorch.sections import AlgorithmConfig
from jorch.types import Group, Sample, Trajectory

COPY_TOLERANCE_NATS = 1e-3  # above float32 noise between batch slots, far below a change of policy


class Piece(NamedTuple):
    """What one turn appends to a sample, [n] each."""

    sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray


def from_group(group: Group, algorithm: AlgorithmConfig) -> list[Sample]:
    """The samples of a group, copies merged; trajectories that `algorithm` drops give none.

    Dropped trajectories still count in the group's mean and std: the filters are for the loss only.
    """
    samples = []
    for trajectory, advantage in zip(group.trajectories, group.advantages, strict=True):
        if algorithm.drop_invalid and not trajectory.format_valid:
            continue
        if algorithm.drop_unanswered and not trajectory.judged:
            continue
        samples.extend(from_trajectory(trajectory, float(advantage)))
    return merge_copies(samples)


def from_trajectory(trajectory: Trajectory, advantage: float) -> Iterator[Sample]:
    """Turns join one sample while each prompt extends the tokens so far exactly; otherwise a new one opens.

    A chat template that rewrites the past (Qwen3's drops earlier thoughts) therefore forks; every fork has
    the trajectory's advantage. Only sampled tokens are trained; forks without any are left out.
    """
    tokens = np.zeros(0, np.int32)
    pieces: list[Piece] = []
    for turn in trajectory.turns:
        prompt, completion = turn.prompt_token_ids, turn.completion
        assert len(prompt), f"{trajectory.trajectory_id}: a turn without prompt"
        if not np.array_equal(prompt[: len(tokens)], tokens):
            yield from _close(tokens, pieces, advantage)
            tokens, pieces = np.zeros(0, np.int32), []
        num_observed = len(prompt) - len(tokens)
        sampled = np.arange(num_observed + len(completion.token_ids)) >= num_observed
        logprobs = np.concatenate([np.zeros(num_observed), completion.logprobs]).astype(np.float32)
        versions = np.concatenate([np.full(num_observed, -1), completion.policy_versions]).astype(np.int32)
        pieces.append(Piece(sampled, logprobs, versions))
        tokens = np.concatenate([prompt, completion.token_ids]).astype(np.int32)
    yield from _close(tokens, pieces, advantage)


def _close(tokens: np.ndarray, pieces: list[Piece], advantage: float) -> Iterator[Sample]:
    if any(piece.sampled.any() for piece in pieces):
        sampled, logprobs, versions = (np.concatenate(part) for part in zip(*pieces, strict=True))
        yield Sample(tokens, sampled, logprobs, advantage, policy_versions=versions)


def merge_copies(samples: Iterable[Sample]) -> list[Sample]:
    """The samples, identical ones merged into the first of them with the sum of their `num_copies`.

    Losses are linear in a token's weight and copies have the same loss, so k copies equal one of weight k.
    Siblings that agree in tokens but not in logprobs were sampled by different weights and stay apart.
    """
    merged: dict[tuple[bytes, bytes, bytes, float], list[Sample]] = {}
    for sample in samples:
        versions = b"" if sample.policy_versions is None else sample.policy_versions.tobytes()
        key = (sample.token_ids.tobytes(), sample.loss_mask.tobytes(), versions, sample.advantage)
        twins = merged.setdefault(key, [])
        for i, twin in enumerate(twins):
            if np.allclose(twin.logprobs, sample.logprobs, rtol=0, atol=COPY_TOLERANCE_NATS):
                twins[i] = replace(twin, num_copies=twin.num_copies + sample.num_copies)
                break
        else:
            twins.append(sample)
    return [twin for twins in merged.values() for twin in twins]
