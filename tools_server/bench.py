"""`python -m tools_server bench`: what the server itself costs, on this machine, in one run.

Every figure is of one server process on loopback and one client process. A bare aiohttp echo answers the same requests
in the same run, so that a slow machine shows in both. CPU time is the server process's own, from its clock.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import yaml

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
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CALLS_A_SESSION = 50
Call = Callable[[int], Awaitable[Any]]


class Server:
    """A child process that prints its address, and what the kernel says about it."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    @classmethod
    async def start(cls, *arguments: str) -> "Server":
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode().split()
        if not line:
            raise ValueError(f"a server of the benchmark did not start: {' '.join(arguments)[:100]}")
        return cls(process, line[-1])

    async def stop(self) -> None:
        self.process.terminate()
        await self.process.wait()

    @property
    def cpu_s(self) -> float:
        """User and system time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    @property
    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Client:
    """The wire, as an orchestrator's driver speaks it."""

    def __init__(self, server: Server, http: aiohttp.ClientSession) -> None:
        self.server, self._http = server, http
        self._num_sessions = 0

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        async with self._http.post(self.server.url + path, data=json.dumps(payload)) as response:
            if response.status != 200:
                raise RuntimeError(f"{path}: HTTP {response.status}: {(await response.text())[:200]}")
            return await response.json()

    async def open(self, count: int = 1) -> list[str]:
        names = [f"bench/{self._num_sessions + i}" for i in range(count)]
        self._num_sessions += count
        for start in range(0, count, MAX_ITEMS):
            sessions = [
                {"session_id": name, "environment": "tools", "setup": {}} for name in names[start : start + MAX_ITEMS]
            ]
            answer = await self.post("/v1/sessions", {"sessions": sessions})
            if refused := next((s["error"] for s in answer["sessions"] if s["error"]), None):
                raise RuntimeError(refused)
        return names

    async def call(self, session: str, call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"session_id": session, "call_id": call_id, "name": name, "arguments": arguments}
        return (await self.post("/v1/calls", {"calls": [call]})).get("results", [{}])[0]

    async def call_null(self, session: str, number: int) -> None:
        await self.call(session, str(number), "null", {"query": f"what is {number}"})

    async def finish(self, *sessions: str) -> None:
        for start in range(0, len(sessions), MAX_ITEMS):
            await self.post("/v1/finish", {"session_ids": list(sessions[start : start + MAX_ITEMS])})


async def closed_loop(call: Call, num_calls: int, at_once: int) -> list[float]:
    """Seconds of each of `num_calls` calls, of which `at_once` are under way at any time."""
    seconds: list[float] = []
    numbers = iter(range(num_calls))

    async def work() -> None:
        for number in numbers:
            began_s = time.perf_counter()
            await call(number)
            seconds.append(time.perf_counter() - began_s)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return seconds


async def open_loop(call: Call, num_calls: int, per_second: float) -> list[float]:
    """Seconds from when each call was due to its answer: a call that had to wait for its start counts the wait."""
    began_s = time.perf_counter()

    async def one(number: int) -> float:
        due_s = began_s + number / per_second
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        await call(number)
        return time.perf_counter() - due_s

    return list(await asyncio.gather(*(one(number) for number in range(num_calls))))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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


async def live_sessions(client: Client, count: int = 1000) -> dict[str, float]:
    """Memory of sessions that stay open, and the time to open one."""
    warm = await client.open(10)
    await client.finish(*warm)
    before_bytes, began_s = client.server.resident_bytes, time.perf_counter()
    names = await client.open(count)
    open_ms = (time.perf_counter() - began_s) / count * 1e3
    per_session_bytes = (client.server.resident_bytes - before_bytes) / count
    await client.finish(*names)
    return {"session_kib": per_session_bytes / 1024, "open_session_ms": open_ms}


async def burst(client: Client, rollouts: int = 256, calls: int = 10) -> dict[str, float]:
    """Rollouts that start together: open, `calls` calls one after the other, finish."""

    async def rollout() -> None:
        [name] = await client.open()
        for number in range(calls):
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
    """What is left behind by many short sessions: growth between one tenth of the way and the end."""
    size, marks = 100, []
    for number in range(10):
        for _ in range(num_calls // 10 // size):
            [name] = await client.open()

            async def call(number: int, name: str = name) -> None:
                await client.call_null(name, number)

            await closed_loop(call, size, at_once=16)
            await client.finish(name)
        marks.append((client.server.resident_bytes, client.server.num_descriptors))
        print(f"soak: {(number + 1) * 10} %", file=sys.stderr, flush=True)
    (first_bytes, first_descriptors), (last_bytes, last_descriptors) = marks[0], marks[-1]
    return {
        "soak_calls": num_calls // 10 // size * size * 10,
        "soak_growth_mib": (last_bytes - first_bytes) / 1024**2,
        "soak_descriptors": last_descriptors - first_descriptors,
    }


async def measure(quick: bool) -> dict[str, float]:
    """All figures, by name and unit."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "tools": {"null": NULL, "python": {"kind": "python", "sandboxes": 4}},
            "traces": f"{folder}/traces.jsonl",
        }
        Path(folder, "server.yaml").write_text(yaml.safe_dump(config))
        server = await Server.start("-m", "tools_server", "--config", f"{folder}/server.yaml", "--port", "0")
        echo = await Server.start("-c", ECHO)
        try:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector) as http:
                client = Client(server, http)
                num_calls = 300 if quick else 5000
                figures |= await null_tool(client, Client(echo, http), num_calls)
                figures |= await overhead(client, num_calls)
                figures |= await live_sessions(client, 50 if quick else 1000)
                figures |= await burst(client, 16 if quick else 256)
                figures |= await python_tool(client, 10 if quick else 300)
                figures |= await soak(client, 2000 if quick else 100_000)
        finally:
            await server.stop()
            await echo.stop()
    return figures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools_server bench",
        description="Measure the server on this machine: CPU, latency, memory, the python tool, a soak.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, date and machine there too")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; no figure counts")
    arguments = parser.parse_args(argv)
    figures = asyncio.run(measure(arguments.quick))
    for name, value in figures.items():
        print(f"{name:24}{value:12,.4g}")
    if arguments.json is not None:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        report = {"date": date.today().isoformat(), "machine": machine, "quick": arguments.quick, "figures": figures}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0
