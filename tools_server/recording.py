"""Recorded tool calls: the same call is answered as before, at the price and in the time of the first one.

A call's key is what its answer may depend on: tool, version, arguments, the state before it, and the session's seed;
never a session's name. Calls that write are not recorded: their state lies outside this server. Infrastructure failures
are not recorded either.
"""

import asyncio
import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from tools_server.config import RecordingConfig
from tools_server.errors import log
from tools_server.tool import CallContext, ToolOutput, ToolSpec, Usage


def recording_key(spec: ToolSpec, arguments: dict[str, Any], seed: int, state: str = "") -> str:
    """`state`: a digest of the world before the call, "" where the tool has none."""
    seen = json.dumps([spec.name, spec.version, arguments, state, seed], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(seen.encode("utf-8", "surrogatepass")).hexdigest()


class Recorder:
    """The recordings of one file (SQLite). Equal calls that come at once are carried out once."""

    def __init__(self, config: RecordingConfig) -> None:
        """Raises ValueError where the file cannot be used."""
        self._mode = config.mode
        self._under_way: dict[str, asyncio.Task[ToolOutput]] = {}
        self._waiting: Counter[asyncio.Task[ToolOutput]] = Counter()
        self.failed = False
        """Whether the last answer that should have been recorded could not be."""
        try:
            config.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(config.path, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, call TEXT, output TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"recording.path: {config.path} cannot be used ({error})") from None

    def close(self) -> None:
        self._file.close()

    async def call(
        self,
        spec: ToolSpec,
        arguments: dict[str, Any],
        context: CallContext,
        carry_out: Callable[[], Awaitable[ToolOutput]],
    ) -> ToolOutput:
        """The recorded output, or that of `carry_out`, recorded; which one, the mode says."""
        if spec.side_effect == "write":
            return await carry_out()
        world = "" if context.simulation is None else context.simulation.model_dump_json()
        world += "" if context.clock_s is None else f"at {context.clock_s}"
        key = recording_key(spec, arguments, context.seed, world)
        known = None if self._mode == "record" else self._find(key)
        if known is not None:
            return known
        if self._mode == "replay_or_fail":
            return ToolOutput(f"no recording of this call of {spec.name}", "infra_error")
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._record(key, spec, arguments, context, carry_out))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        self._waiting[task] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[task] -= 1
            if not self._waiting[task]:
                del self._waiting[task]
                self._forget(key, task)
                task.cancel()  # nobody waits any more; one that is done stays done

    def _forget(self, key: str, task: asyncio.Task[ToolOutput]) -> None:
        """The next call of this key is carried out anew."""
        if self._under_way.get(key) is task:
            del self._under_way[key]

    async def _record(
        self,
        key: str,
        spec: ToolSpec,
        arguments: dict[str, Any],
        context: CallContext,
        carry_out: Callable[[], Awaitable[ToolOutput]],
    ) -> ToolOutput:
        output = await carry_out()
        if output.error != "infra_error":
            self._store(key, spec, arguments, context, output)
        return output

    def _find(self, key: str) -> ToolOutput | None:
        row = self._file.execute("SELECT output FROM calls WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        fields = json.loads(row[0])
        return ToolOutput(**fields | {"usage": Usage(**fields["usage"])})

    def _store(
        self, key: str, spec: ToolSpec, arguments: dict[str, Any], context: CallContext, output: ToolOutput
    ) -> None:
        """A disk that is full costs the recording, not the call."""
        call = json.dumps({"tool": spec.name, "version": spec.version, "arguments": arguments, "seed": context.seed})
        try:
            row = (key, call, json.dumps(asdict(output)))
            self._file.execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?)", row)
            self.failed = False
        except sqlite3.Error as error:
            self.failed = True
            log.error("a call was not recorded: %s", error, extra={"tool": spec.name})
