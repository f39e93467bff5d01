"""The rollout driver's side of the tool server: coalesced requests, time limits, retries.

Calls made in the same event-loop tick travel in one request, so hundreds of concurrent trajectories need few
connections. Its answers come as they are ready: none waits for a slower one. Every request may be repeated
(`tools_server/wire.py`), so a network failure is retried with exponential back-off; when that is spent,
`ToolServerDown` names the address and the last failure. A server that has no room (HTTP 429) has accepted nothing: its
`Retry-After` is kept, and a batch of several goes again in two halves.
"""

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import aiohttp

from tools_server.wire import (
    API_VERSION,
    MAX_ITEMS,
    STREAM,
    Call,
    CallResult,
    OpenSession,
    SessionOpened,
    SessionRecord,
    to_json,
)

TOKEN_VARIABLE = "JORCH_TOOLS_TOKEN"
BACKOFF_S = 0.5
"""Before the first retry; doubled before each further one."""
BUSY_S = 600.0
"""For how long a server may have no room for a request."""


class ToolServerDown(ConnectionError):
    """The server did not answer after all retries. The message names its address and the last failure."""


class _NoRoom(Exception):
    """The server accepted nothing of a batch; a smaller one may find room."""


class _Endpoint(NamedTuple):
    path: str
    items: str
    answers: str
    encode: Callable[[Any], Any]
    decode: Callable[..., Any]


_OPEN = _Endpoint("/v1/sessions", "sessions", "sessions", to_json, SessionOpened)
_CALL = _Endpoint("/v1/calls", "calls", "results", to_json, CallResult)
_FINISH = _Endpoint("/v1/finish", "session_ids", "records", str, SessionRecord)

_Queue = list[tuple[Any, asyncio.Future[Any]]]


class ToolClient:
    """An async context manager; entering it asks the server for its health.

    Every method raises ToolServerDown as above, and ValueError with the server's own line where it refuses
    the request (HTTP 4xx: wrong token, malformed batch). A refused session is an answer, with `error` set.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int) -> None:
        """`timeout_s` limits each attempt; `retries` follow the first one."""
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"tools_server.url: got {url!r}, expected an address such as http://127.0.0.1:8900")
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._queues: dict[_Endpoint, _Queue] = {_OPEN: [], _CALL: [], _FINISH: []}
        self._exchanges: set[asyncio.Task[None]] = set()
        self._kept: set[str] = set()

    async def __aenter__(self) -> Self:
        token = os.environ.get(TOKEN_VARIABLE)
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            connector=aiohttp.TCPConnector(limit=0),
        )
        try:
            health = await self.health()
            version = health.get("version")
            if version != API_VERSION:
                raise ValueError(f"tool server {self.url} speaks version {version}, this program {API_VERSION}")
        except BaseException:
            await self._http.close()
            raise
        self._renewing = asyncio.create_task(self._renew_leases(health.get("lease_s", 3600.0) / 3))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (self._renewing, *self._exchanges):
            task.cancel()
        await asyncio.gather(self._renewing, *self._exchanges, return_exceptions=True)
        await self._http.close()

    async def health(self) -> dict[str, Any]:
        """{"status": "ok", "version": ..., "sessions": n, "lease_s": s}"""
        return await self._request("GET", "/healthz")

    def open(self, session: OpenSession) -> asyncio.Future[SessionOpened]:
        """Sent in this tick of the event loop, awaited or not."""
        return self._send(_OPEN, session)

    async def call(self, call: Call) -> CallResult:
        return await self._send(_CALL, call)

    async def finish(self, session_id: str) -> SessionRecord:
        return await self._send(_FINISH, session_id)

    @contextlib.contextmanager
    def keep(self, session_id: str) -> Iterator[None]:
        """The server does not forget the session while the block runs, however long that waits for a sampler."""
        self._kept.add(session_id)
        try:
            yield
        finally:
            self._kept.discard(session_id)

    async def _renew_leases(self, interval_s: float) -> None:
        """Until cancelled. A failure is left to those who use the sessions."""
        while True:
            await asyncio.sleep(interval_s)
            kept = sorted(self._kept)
            for start in range(0, len(kept), MAX_ITEMS):
                with contextlib.suppress(ToolServerDown, ValueError):
                    await self._request("POST", "/v1/heartbeats", {"session_ids": kept[start : start + MAX_ITEMS]})

    def _send(self, endpoint: _Endpoint, item: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        queue = self._queues[endpoint]
        if not queue:
            loop.call_soon(self._flush, endpoint)
        answer: asyncio.Future[Any] = loop.create_future()
        queue.append((item, answer))
        return answer

    def _flush(self, endpoint: _Endpoint) -> None:
        queue, self._queues[endpoint] = self._queues[endpoint], []
        for start in range(0, len(queue), MAX_ITEMS):
            exchange = asyncio.create_task(self._exchange(endpoint, queue[start : start + MAX_ITEMS]))
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._exchanges.discard)

    async def _exchange(self, endpoint: _Endpoint, batch: _Queue) -> None:
        """Send one batch and give every waiter its own answer, or its own copy of the failure."""
        try:
            items = {endpoint.items: [endpoint.encode(item) for item, _ in batch]}
            payload = await self._request("POST", endpoint.path, items, len(batch) > 1, partial(_give, endpoint, batch))
            if payload is not None:
                records = payload[endpoint.answers]
                assert len(records) == len(batch), (endpoint.path, len(records), len(batch))
                _give(endpoint, batch, dict(enumerate(records)))
            assert all(answer.done() for _, answer in batch), endpoint.path
        except _NoRoom:
            try:
                await self._exchange(endpoint, batch[: len(batch) // 2])
                await self._exchange(endpoint, batch[len(batch) // 2 :])
            finally:
                for _, answer in batch:
                    answer.cancel()  # those that were not sent; one that is there stays
        except asyncio.CancelledError:
            for _, answer in batch:
                answer.cancel()
            raise
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(type(error)(*error.args))
                    answer.exception()  # counts as read: a waiter cancelled by now never will, and asyncio would log it

    async def _request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None = None,
        divisible: bool = False,
        give: Callable[[dict[int, Any]], None] | None = None,
    ) -> Any:
        """The answer's JSON object, after as many attempts as it takes and `retries` allow; waits for room are none.

        None where all has gone to `give`, by position and in pieces; after a failure half-way some of it twice.

        Raises _NoRoom where the server is full and the request is `divisible`.
        """
        body = None if payload is None else json.dumps(payload).encode()
        headers = {"Content-Type": "application/json", "Accept": f"{STREAM}, application/json" if give else "*/*"}
        failure, attempt, full_since_s = "", 0, None
        while attempt <= self._retries:
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            attempt += 1
            try:
                async with self._http.request(method, self.url + path, data=body, headers=headers) as response:
                    if give and response.status == 200 and response.content_type == STREAM:
                        return await _read_lines(response, give)
                    status, text = response.status, await response.read()
                    wait_s = _seconds(response.headers.get("Retry-After", ""))
            except TimeoutError:
                failure = f"no answer within {self._timeout_s:g} s"
                continue
            except (aiohttp.ClientError, OSError) as error:
                failure = str(error) or type(error).__name__
                continue
            if status == 429:
                if divisible:
                    raise _NoRoom
                full_since_s = full_since_s or time.monotonic()
                if time.monotonic() - full_since_s > BUSY_S:
                    failure = f"no room for {BUSY_S:g} s: {_error_line(text)}"
                    break
                attempt = 0
                await asyncio.sleep(wait_s * random.uniform(1.0, 1.5))  # apart from the others that wait
                continue
            if status < 500:
                return self._read(path, status, text)
            failure = f"HTTP {status}: {_error_line(text)}"
        attempts = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        raise ToolServerDown(f"tool server {self.url} does not answer ({attempts} at {path}): {failure}")

    def _read(self, path: str, status: int, text: bytes) -> dict[str, Any]:
        if status != 200:
            raise ValueError(f"tool server {self.url} refused {path} (HTTP {status}): {_error_line(text)}")
        try:
            return json.loads(text)
        except ValueError:
            raise ValueError(f"{self.url} is no tool server: {path} did not answer with JSON") from None


def _give(endpoint: _Endpoint, batch: _Queue, records: dict[int, Any]) -> None:
    """Hand records to their waiters, by position in the batch."""
    for position, record in records.items():
        answer = batch[position][1]
        if not answer.done():
            answer.set_result(endpoint.decode(**record))


async def _read_lines(response: aiohttp.ClientResponse, give: Callable[[dict[int, Any]], None]) -> None:
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            give({int(position): record for position, record in json.loads(line).items()})


def _seconds(retry_after: str) -> float:
    """Of the header: at least BACKOFF_S, also where it is missing or a date."""
    return max(BACKOFF_S, float(retry_after)) if retry_after.isdigit() else BACKOFF_S


def _error_line(text: bytes) -> str:
    """The server's own line; of another server's page, its beginning."""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.decode(errors="replace").split())[:200]
