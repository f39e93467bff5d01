"""Drives a server as clients do and reads what the kernel says about its process: for benchmarks."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tools_server.sandbox.cgroup import PREFIX, ROOT
from tools_server.wire import MAX_ITEMS

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
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
        """Of the server and its worker processes; not of sandboxes, which come and go."""
        pids = [self.process.pid, *(pid for pid in self._below() if _holds_environments(pid))]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def num_processes(self) -> int:
        """Of all below the server."""
        return len(self._below())

    def _below(self) -> set[int]:
        below, parents = {self.process.pid}, _parents()
        while found := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= found
        return below - {self.process.pid}

    @property
    def num_cgroups(self) -> int:
        """Of its sandboxes, each controller's tree counted."""
        return sum(1 for _ in ROOT.rglob(f"{PREFIX}{self.process.pid}-*"))


def _holds_environments(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return b"tools_server.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _parents() -> dict[int, int]:
    """The parent of every process of the machine."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return parents


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

    async def open(self, count: int = 1, environment: str = "tools", setup: dict[str, Any] | None = None) -> list[str]:
        names = [f"bench/{self._num_sessions + i}" for i in range(count)]
        self._num_sessions += count
        for start in range(0, count, MAX_ITEMS):
            sessions = [
                {"session_id": name, "environment": environment, "setup": setup or {}}
                for name in names[start : start + MAX_ITEMS]
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
