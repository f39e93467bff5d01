"""`python -m tools_server conformance tau2`: every task's gold calls played over HTTP against a server.

A task is met if the server's verdict is 1. The variants show what a verdict is worth: an agent that does nothing, one
that leaves out every argument, and one that leaves out its last write.
"""

import argparse
import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from tools_server.app import make_app
from tools_server.config import TOKEN_VARIABLE, ServerConfig
from tools_server.envs import tau2

VARIANTS = ("gold", "no-op", "empty-arguments", "dropped-write")
AT_ONCE = 8
"""Tasks that are played at the same time."""


class Step(NamedTuple):
    """One call of a script; name "" is a message to the user."""

    name: str
    arguments: dict[str, Any]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server conformance",
        description="Play the gold calls of every task over HTTP; exit status 1 where a task is not met.",
    )
    parser.add_argument("benchmark", choices=["tau2"])
    parser.add_argument("--domain", choices=tau2.DOMAINS, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="gold", help="what the agent does (default: gold)")
    parser.add_argument("--url", help="of a running server; default: one of the command's own, on a free port")
    arguments = parser.parse_args(argv)
    outcomes = asyncio.run(play_domain(arguments.domain, arguments.variant, arguments.url))
    for task_id in (task_id for task_id, outcome in outcomes.items() if outcome != 1.0):
        if arguments.variant == "gold":
            print(f"not met: {task_id}")
    met = sum(outcome == 1.0 for outcome in outcomes.values())
    print(f"{met}/{len(outcomes)}")
    return 0 if met == len(outcomes) or arguments.variant != "gold" else 1


async def play_domain(domain: str, variant: str, url: str | None = None) -> dict[str, float]:
    """The verdict on every task to which `variant` applies, by task."""
    tasks = tau2.load_domain(domain).tasks
    writes = write_names(domain)
    scripts = {task_id: script(task, variant, writes) for task_id, task in tasks.items()}
    limit = asyncio.Semaphore(AT_ONCE)

    async with contextlib.AsyncExitStack() as stack:
        if url is None:
            url = await stack.enter_async_context(_own_server())
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        http = await stack.enter_async_context(aiohttp.ClientSession(url, headers=headers))

        async def play(task_id: str, steps: Sequence[Step]) -> float:
            async with limit:
                user = "silent" if variant == "no-op" else "gold"
                return await play_task(http, {"domain": domain, "task_id": task_id, "user": user}, steps)

        played = {task_id: steps for task_id, steps in scripts.items() if steps is not None}
        outcomes = await asyncio.gather(*(play(task_id, steps) for task_id, steps in played.items()))
    return dict(zip(played, outcomes, strict=True))


def write_names(domain: str) -> set[str]:
    """The agent's tools that change the database."""
    toolkit = tau2.World(tau2.load_domain(domain)).environment.tools
    return {name for name in toolkit.get_tools() if toolkit.tool_type(name).value == "write"}


def script(task: Any, variant: str, writes: set[str]) -> list[Step] | None:
    """What the agent does in `task`; None where the variant would be the gold one.

    Where the user has actions of its own, a message gives it the floor; the last one tells what the task wants told.
    """
    criteria = task.evaluation_criteria
    farewell = Step("", {"content": " ".join(criteria.communicate_info or []) or "Done."})
    if variant == "no-op":
        return [Step("", {"content": "I can not help."})]
    steps = []
    for action in criteria.actions or []:
        if action.requestor == "user":
            if not steps or steps[-1].name:
                steps.append(Step("", {"content": "Please go on."}))
        else:
            steps.append(Step(action.name, {} if variant == "empty-arguments" else action.arguments))
    if variant == "dropped-write":
        last = next((i for i in reversed(range(len(steps))) if steps[i].name in writes), None)
        if last is None:
            return None
        del steps[last]
    elif variant == "empty-arguments" and not any(step.name for step in steps):
        return None
    return [*steps, farewell]


async def play_task(http: aiohttp.ClientSession, setup: dict[str, Any], steps: Sequence[Step]) -> float:
    """The verdict after `steps`. Raises ValueError where the server refuses the session or fails."""
    name = f"conformance/{uuid.uuid4().hex}"
    session = {"session_id": name, "environment": "tau2", "setup": setup}
    opened = await _post(http, "/v1/sessions", {"sessions": [session]}, "sessions")
    if opened["error"]:
        raise ValueError(f"task {setup['task_id']}: {opened['error']}")
    ended = False
    number = 0
    while not ended:  # a user whose part was interrupted by a dropped call still has to be let go
        step = steps[min(number, len(steps) - 1)]
        call = {"session_id": name, "call_id": str(number), "name": step.name, "arguments": step.arguments}
        ended = (await _post(http, "/v1/calls", {"calls": [call]}, "results"))["ended"]
        number += 1
    record = await _post(http, "/v1/finish", {"session_ids": [name]}, "records")
    if record["error"]:
        raise ValueError(f"task {setup['task_id']}: {record['error']}")
    return record["outcome"]


async def _post(http: aiohttp.ClientSession, path: str, payload: dict[str, Any], key: str) -> dict[str, Any]:
    """The only item of the answer's list."""
    async with http.post(path, json=payload) as response:
        answer = await response.json()
        if response.status != 200:
            raise ValueError(f"{path}: {answer['error']}")
        return answer[key][0]


@contextlib.asynccontextmanager
async def _own_server() -> AsyncIterator[str]:
    """The url of a server on loopback."""
    runner = web.AppRunner(make_app(ServerConfig.model_validate({})), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
