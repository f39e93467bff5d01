"""Trajectories as JSON: the rows of trajectories.jsonl, for people and the report to read.

`run_folder.read_jsonl` reads them back.
"""

from collections.abc import Sequence
from typing import Any

from jorch.types import Task, ToolCall, ToolResult, Trajectory, Turn


def trajectory_record(
    step: int, task: Task, trajectory: Trajectory, reward: float, advantage: float, texts: Sequence[str]
) -> dict[str, Any]:
    """A trajectory as one JSON object: what was read, sampled, called and observed, and how it was judged.

    Args:
        reward: 0 where the trajectory got none (it was lost).
        texts: the decoded first prompt, then the decoded completion of every turn.
    """
    assert len(texts) == 1 + len(trajectory.turns), (len(texts), len(trajectory.turns))
    return {
        "step": step,
        "task_id": task.task_id,
        "trajectory_id": trajectory.trajectory_id,
        "prompt": texts[0],
        "turns": [_turn_record(turn, text) for turn, text in zip(trajectory.turns, texts[1:], strict=True)],
        "termination": trajectory.termination,
        "outcome": float(trajectory.outcome),
        "cost_usd": float(trajectory.cost_usd),
        "latency_s": float(trajectory.latency_s),
        "reward": float(reward),
        "advantage": float(advantage),
        "preference": dict(task.preference),
        "format_valid": trajectory.format_valid,
    }


def _turn_record(turn: Turn, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "calls": [_call_record(call) for call in turn.calls],
        "results": [_result_record(result) for result in turn.results],
        "num_tokens": len(turn.completion.token_ids),
        "token_ids": turn.completion.token_ids.tolist(),
        "logprobs": turn.completion.logprobs.tolist(),
        "policy_versions": turn.completion.policy_versions.tolist(),
    }


def _call_record(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _result_record(result: ToolResult) -> dict[str, Any]:
    return {
        "tool": result.tool,
        "content": result.content,
        "cost_usd": float(result.cost_usd),
        "latency_s": float(result.latency_s),
        "error": result.error,
    }
