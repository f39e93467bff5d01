"""When a call is of no use any more: its caller's deadline passes, its caller has gone, or its session is deleted.

A call is cut by a `TimeoutError` in its own task, so that whatever it waits for (a sandbox, a request to a model) is
ended and cleaned up by the code that started it.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any


class Deadlines:
    """The calls of a server that are under way, and who waits for them."""

    def __init__(self, abandon_s: float) -> None:
        """`abandon_s`: for how long a call goes on for which nobody waits."""
        self._abandon_s = abandon_s
        self._limits: dict[asyncio.Future[Any], asyncio.Timeout] = {}
        self._waiting: dict[asyncio.Future[Any], int] = {}

    def __len__(self) -> int:
        """Calls under way."""
        return len(self._limits)

    def limit(self, seconds: float | None) -> "Limit":
        """Raises TimeoutError in the current task, after `seconds` or when it is cut."""
        return Limit(self._limits, seconds)

    def cut(self, call: asyncio.Future[Any]) -> None:
        """End the call now. One that has its result keeps it."""
        limit = self._limits.get(call)
        if limit is not None:
            limit.reschedule(asyncio.get_running_loop().time())

    async def end(self, patience_s: float) -> None:
        """Wait for all calls under way, and cut those that need longer than `patience_s`."""
        if self._limits:
            await asyncio.wait(list(self._limits), timeout=patience_s)
        for call in list(self._limits):
            self.cut(call)

    def awaited(self, calls: Sequence[asyncio.Future[Any]]) -> "Awaited":
        """A block in which a client waits for their results. When it disconnects they may soon be cut."""
        return Awaited(self, calls)

    def begin_wait(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        for call in calls:
            self._waiting[call] = self._waiting.get(call, 0) + 1

    def end_wait(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        for call in calls:
            others = self._waiting.pop(call) - 1
            if others:
                self._waiting[call] = others

    def abandon(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        """Cut them soon, unless somebody waits for them by then."""
        asyncio.get_running_loop().call_later(self._abandon_s, self._cut_abandoned, calls)

    def _cut_abandoned(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        for call in calls:
            if call not in self._waiting:
                self.cut(call)


class Awaited:
    """A context manager; written out, as `Limit` is."""

    __slots__ = ("_calls", "_deadlines")

    def __init__(self, deadlines: Deadlines, calls: Sequence[asyncio.Future[Any]]) -> None:
        self._deadlines, self._calls = deadlines, calls

    def __enter__(self) -> None:
        self._deadlines.begin_wait(self._calls)

    def __exit__(self, kind: type[BaseException] | None, *failure: Any) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError | ConnectionError):
            self._deadlines.abandon(self._calls)
        self._deadlines.end_wait(self._calls)


class Limit:
    """An async context manager; written out, because it is entered once per call."""

    __slots__ = ("_limits", "_task", "_timeout")

    def __init__(self, limits: dict[asyncio.Future[Any], asyncio.Timeout], seconds: float | None) -> None:
        self._limits = limits
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        await self._timeout.__aenter__()
        self._task = task
        self._limits[task] = self._timeout

    async def __aexit__(self, *failure: Any) -> None:
        del self._limits[self._task]
        await self._timeout.__aexit__(*failure)
