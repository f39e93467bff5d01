"""When a call is of no use any more: its caller's deadline passes, its caller has gone, or its session is deleted.

A call is cut by a `TimeoutError` in its own task, so that whatever it waits for (a sandbox, a request to a model) is
ended and cleaned up by the code that started it.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class Deadlines:
    """The calls of a server that are under way, and who waits for them."""

    def __init__(self, abandon_s: float) -> None:
        """`abandon_s`: for how long a call goes on for which nobody waits."""
        self._abandon_s = abandon_s
        self._limits: dict[asyncio.Future[Any], asyncio.Timeout] = {}
        self._waiting: Counter[asyncio.Future[Any]] = Counter()

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

    @contextlib.contextmanager
    def awaited(self, calls: Sequence[asyncio.Future[Any]]) -> Iterator[None]:
        """A block in which a client waits for their results. When it disconnects they may soon be cut."""
        self._waiting.update(calls)
        try:
            yield
        except (asyncio.CancelledError, ConnectionError):
            asyncio.get_running_loop().call_later(self._abandon_s, self._cut_abandoned, calls)
            raise
        finally:
            for call in calls:
                self._waiting[call] -= 1
                if not self._waiting[call]:
                    del self._waiting[call]

    def _cut_abandoned(self, calls: Iterable[asyncio.Future[Any]]) -> None:
        for call in calls:
            if call not in self._waiting:
                self.cut(call)


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
