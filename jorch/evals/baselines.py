"""Policies without a model, which read a miniature task's truth: the trained orchestrator's yardsticks.

Each gathers exactly the evidence that the task needs and then answers; they differ in the experts that they
choose. They play through the same tool server as the model does, so that all numbers come from one ledger.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from jorch.rollout.outcomes import EvalRow, row_from
from jorch.rollout.tool_client import Call, OpenSession, ToolClient, ToolServerDown
from jorch.types import Task

POLICIES = ("random_capable", "always_strongest", "cheapest_capable", "fastest_capable", "oracle")


def choose(policy: str, task: Task, function: str, rng: random.Random) -> str:
    """The alias that `policy` calls for `function`; ties are broken by `rng`.

    always_strongest takes the highest skill whatever its price; the others choose among the experts that can
    solve the task. oracle minimises each call's share of the utility's penalties; these add up over calls, so
    that is optimal.
    """
    experts = task.truth["experts"]
    if policy == "always_strongest":
        candidates = [alias for alias, expert in experts.items() if expert["function"] == function]
    else:
        candidates = task.truth["capable"][function]
    objectives: dict[str, Callable[[str], float]] = {
        "random_capable": lambda alias: 0.0,
        "always_strongest": lambda alias: -experts[alias]["skill"],
        "cheapest_capable": lambda alias: experts[alias]["usd_per_million_tokens"],
        "fastest_capable": lambda alias: experts[alias]["latency_s"],
        "oracle": lambda alias: _penalty(task, alias),
    }
    objective = objectives[policy]
    least = min(map(objective, candidates))
    return rng.choice([alias for alias in candidates if objective(alias) == least])


def _penalty(task: Task, alias: str) -> float:
    truth, weights, expert = task.truth, task.preference, task.truth["experts"][alias]
    return (
        weights["cost"] * expert["cost_usd"] / truth["max_cost_usd"]
        + weights["latency"] * expert["latency_s"] / truth["max_latency_s"]
        - (weights[alias] if alias == truth["subject"] else 0.0)
    )


async def play(policy: str, tasks: Sequence[Task], client: ToolClient, seed: int, concurrency: int) -> list[EvalRow]:
    """Play every task once with `policy`, at most `concurrency` at a time; rows come in the order of `tasks`.

    Raises:
        ValueError: the server refuses a task's session, for instance for an expert that its config lacks.
        ToolServerDown: the server cannot be reached.
    """
    # The tag keeps sessions apart from those of an earlier evaluation on a server that is still up.
    tag = f"baseline/{policy}/{uuid4().hex}"
    free = asyncio.Semaphore(concurrency)

    async def limited(index: int, task: Task) -> EvalRow:
        async with free:
            rng = random.Random(f"{seed}/{policy}/{task.task_id}")
            return await _play_one(policy, task, client, f"{tag}/{index}", seed, rng)

    try:
        async with asyncio.TaskGroup() as group:
            played = [group.create_task(limited(index, task)) for index, task in enumerate(tasks)]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [done.result() for done in played]


async def _play_one(
    policy: str, task: Task, client: ToolClient, session_id: str, seed: int, rng: random.Random
) -> EvalRow:
    opened = await client.open(OpenSession(session_id, task.environment, task.setup, seed))
    if opened.error is not None:
        raise ValueError(f"task {task.task_id}: the tool server refused it: {opened.error}")
    ended = False
    for number, function in enumerate((*task.truth["needs"], "answer")):
        arguments: dict[str, Any] = {"model": choose(policy, task, function, rng)}
        ended = (await client.call(Call(session_id, str(number), function, arguments))).ended
    record = await client.finish(session_id)
    if record.error == "unknown_session":
        raise ToolServerDown(f"tool server {client.url} lost a session: it was restarted")
    failed = record.error is not None or not ended
    return row_from(
        task,
        record.outcome,
        record.cost_usd,
        record.latency_s,
        record.tool_counts,
        format_valid=True,
        termination="env_error" if failed else "answered",
    )
