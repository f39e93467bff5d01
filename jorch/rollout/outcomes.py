"""What is measured on one finished trajectory: the row that training metrics and evaluations are made of. Pure."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jorch.types import Task, Termination, Trajectory


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One played task.

    Example: EvalRow("heldout-000001", utility=.72, accuracy=1., cost_usd=.008, latency_s=5., followed=1.,
                     format_valid=1., expert_counts={"search skill 2": 1, "answer skill 3": 1},
                     termination="answered")
    """

    task_id: str
    utility: float
    accuracy: float
    """The environment's outcome in [0, 1]."""
    cost_usd: float
    latency_s: float
    followed: float | None
    """1 where the user's preference was followed, None where the task has none."""
    format_valid: float
    expert_counts: dict[str, int]
    """Calls per kind of expert ("answer skill 3"), or per billed tool where the task does not know skills."""
    termination: Termination


def row_from(
    task: Task,
    outcome: float,
    cost_usd: float,
    latency_s: float,
    tool_counts: Mapping[str, int],
    format_valid: bool,
    termination: Termination,
) -> EvalRow:
    """Measure one trajectory by its task's truth; `tool_counts` are calls per billed tool name.

    Without the miniature world's truth the utility is the outcome, and no preference is judged.
    """
    counts: Counter[str] = Counter()
    experts = task.truth.get("experts", {})
    for name, count in tool_counts.items():
        expert = experts.get(name)
        counts[f"{expert['function']} skill {expert['skill']}" if expert else name] += count
    return EvalRow(
        task_id=task.task_id,
        utility=_utility(task, outcome, cost_usd, latency_s, tool_counts) if experts else float(outcome),
        accuracy=float(outcome),
        cost_usd=float(cost_usd),
        latency_s=float(latency_s),
        followed=_followed(task.truth, outcome, tool_counts) if experts else None,
        format_valid=float(format_valid),
        expert_counts=dict(counts),
        termination=termination,
    )


def trajectory_row(task: Task, trajectory: Trajectory) -> EvalRow:
    """The row of a trajectory that a model played."""
    return row_from(
        task,
        trajectory.outcome,
        trajectory.cost_usd,
        trajectory.latency_s,
        trajectory.tool_counts,
        trajectory.format_valid,
        trajectory.termination,
    )


def _utility(task: Task, outcome: float, cost_usd: float, latency_s: float, tool_counts: Mapping[str, int]) -> float:
    """The preference applied to absolute features: unlike the group reward it compares across policies."""
    truth, weights = task.truth, task.preference
    penalty = (
        weights["cost"] * cost_usd / truth["max_cost_usd"] + weights["latency"] * latency_s / truth["max_latency_s"]
    )
    bonus = weights[truth["subject"]] if truth["subject"] in tool_counts else 0.0
    return outcome * (1 - penalty + bonus)


def _followed(truth: Mapping[str, Any], outcome: float, tool_counts: Mapping[str, int]) -> float | None:
    if truth["kind"] == "none":
        return None
    if outcome < 1:
        return 0.0
    if truth["kind"] in ("avoid", "prefer"):
        return float((truth["subject"] in tool_counts) == (truth["kind"] == "prefer"))
    feature = {"cheap": "usd_per_million_tokens", "fast": "latency_s"}[truth["kind"]]
    experts, capable = truth["experts"], truth["capable"]

    def is_best(alias: str) -> bool:
        expert = experts.get(alias)
        if expert is None:
            return False
        return expert[feature] <= min(experts[a][feature] for a in capable[expert["function"]])

    shortest = sum(tool_counts.values()) == 1 + len(truth["needs"])
    return float(shortest and all(map(is_best, tool_counts)))
