"""What a training step leaves to read: its metrics over trajectories, and some trajectories in full."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jorch.data.tokenizer import Tokenizer
from jorch.rollout.outcomes import trajectory_row
from jorch.rollout.records import trajectory_record
from jorch.run_folder import atomic_write, naming, read_jsonl
from jorch.types import TERMINATIONS, Group, Trajectory


def rollout_metrics(step: int, groups: Sequence[Group], trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over a step's trajectories; lost ones are only counted."""
    rows = [trajectory_row(g.task, t) for g in groups for t in g.trajectories]
    present = [t for g in groups for t in g.trajectories]
    turns = [turn for t in present for turn in t.turns]
    sampled = [turn.completion for turn in turns]
    followed = [row.followed for row in rows if row.followed is not None]
    logprobs = np.concatenate([c.logprobs for c in sampled]) if sampled else np.zeros(1)
    lags = step - np.concatenate([c.policy_versions for c in sampled]) if sampled else np.zeros(1)
    ends = collections.Counter(t.termination for t in trajectories)
    metrics = {
        **{f"termination/{name}": ends[name] / len(trajectories) for name in TERMINATIONS},
        "policy/lag": float(lags.mean()),
        "policy/lag_max": float(lags.max()),
        "rollout/infra_error": 1.0 - len(present) / len(trajectories),
        "rollout/sampled_tokens": float(sum(len(c.token_ids) for c in sampled)),
        # At temperature 1 the mean surprise of sampled tokens estimates the entropy without bias.
        "policy/entropy_nats": -float(logprobs.mean()),
    }
    if not present:
        return metrics
    return metrics | {
        "rollout/tool_calls_per_turn": sum(len(turn.calls) for turn in turns) / max(1, len(turns)),
        "reward/mean": float(np.mean(np.concatenate([g.rewards for g in groups]))),
        "rollout/utility": float(np.mean([row.utility for row in rows])),
        "rollout/accuracy": float(np.mean([t.outcome for t in present])),
        "rollout/cost_usd": float(np.mean([t.cost_usd for t in present])),
        "rollout/latency_s": float(np.mean([t.latency_s for t in present])),
        "rollout/preference_followed": float(np.mean(followed)) if followed else float("nan"),
        "rollout/format_valid": float(np.mean([t.format_valid for t in present])),
        "rollout/answered": float(np.mean([t.termination == "answered" for t in present])),
        "rollout/malformed_calls": float(np.mean([t.num_malformed for t in present])),
        "rollout/turns": float(np.mean([len(t.turns) for t in present])),
    }


class TrajectoryLog:
    """Appends the first groups of every step to trajectories.jsonl; a resumed run first drops later steps."""

    def __init__(self, folder: Path, first_step: int, tokenizer: Tokenizer, groups_per_step: int) -> None:
        self._path = folder / "trajectories.jsonl"
        self._tokenizer = tokenizer
        self._groups_per_step = groups_per_step
        kept = [row for row in read_jsonl(self._path) if row["step"] < first_step]
        atomic_write(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Raises OSError naming the file."""
        with naming(self._path):
            for group in groups[: self._groups_per_step]:
                for trajectory, reward, advantage in zip(
                    group.trajectories, group.rewards, group.advantages, strict=True
                ):
                    texts = trajectory_texts(trajectory, self._tokenizer)
                    record = trajectory_record(step, group.task, trajectory, float(reward), float(advantage), texts)
                    self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __enter__(self) -> "TrajectoryLog":
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path):
            self._file.close()


def trajectory_texts(trajectory: Trajectory, tokenizer: Tokenizer) -> list[str]:
    """The decoded first prompt, then every decoded completion."""
    prompt = trajectory.turns[0].prompt_token_ids if trajectory.turns else np.zeros(0, np.int32)
    return [tokenizer.decode(ids) for ids in (prompt, *(t.completion.token_ids for t in trajectory.turns))]
