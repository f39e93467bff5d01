"""What an application holds, and what all its handlers do: wait for answers, and reply."""

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from aiohttp import web

from tools_server.authorisation import Capabilities
from tools_server.config import ServerConfig
from tools_server.session import Answer
from tools_server.sessions import Sessions
from tools_server.wire import STREAM, SessionOpened, to_json

T = TypeVar("T")
CONFIG = web.AppKey("CONFIG", ServerConfig)
SESSIONS = web.AppKey("SESSIONS", Sessions)
CAPABILITIES = web.AppKey("CAPABILITIES", Capabilities)


async def settle(request: web.Request, answers: Sequence[Answer[T]]) -> list[T]:
    """Wait for the answers that are still tasks. A client that goes away cancels none at once: it may ask again."""
    tasks = [answer for answer in answers if isinstance(answer, asyncio.Future) and not answer.done()]
    if tasks:
        with request.app[SESSIONS].deadlines.awaited(tasks):
            await asyncio.wait(tasks)
    settled: list[Any] = [_result(answer) for answer in answers]
    return settled


async def reply_each(
    request: web.Request, key: str, answers: Sequence[Answer[T]], encode: Callable[[T], Any] = to_json
) -> web.StreamResponse:
    """{key: [...]} once all are there; to a client that accepts STREAM those of slow tools one by one.

    There each line is a JSON object {position in the request: answer, ...} of what became ready together.
    """
    slow = any(isinstance(answer, asyncio.Future) and not answer.done() for answer in answers)
    if not slow or STREAM not in request.headers.get("Accept", ""):
        return reply({key: [encode(answer) for answer in await settle(request, answers)]})
    response = web.StreamResponse(headers={"Content-Type": STREAM})
    await response.prepare(request)
    try:
        await _stream(request, response, answers, encode)
    except Exception:
        # It is too late for a status. A client that asks again, as after any broken connection, is told what happened.
        if request.transport is not None:
            request.transport.abort()
        raise
    return response


async def _stream(
    request: web.Request, response: web.StreamResponse, answers: Sequence[Answer[T]], encode: Callable[[T], Any]
) -> None:
    async def send(positions: Iterable[int]) -> None:
        ready = {position: encode(_result(answers[position])) for position in sorted(positions)}
        await response.write(json.dumps(ready).encode() + b"\n")

    pending: dict[asyncio.Future[Any], list[int]] = {}
    immediate = []
    for position, answer in enumerate(answers):
        if isinstance(answer, asyncio.Future):
            pending.setdefault(answer, []).append(position)  # a call may be asked for twice
        else:
            immediate.append(position)
    finished: asyncio.Queue[asyncio.Future[Any]] = asyncio.Queue()
    for answer in pending:
        answer.add_done_callback(finished.put_nowait)
    with request.app[SESSIONS].deadlines.awaited(list(pending)):
        if immediate:
            await send(immediate)
        while pending:
            together = [await finished.get()]
            while not finished.empty():
                together.append(finished.get_nowait())
            await send(position for answer in together for position in pending.pop(answer))
    await response.write_eof()


def _result(answer: Answer[Any]) -> Any:
    return answer.result() if isinstance(answer, asyncio.Future) else answer


def opened_json(request: web.Request, opened: SessionOpened) -> dict[str, Any]:
    """With the session's token, where it is open."""
    if opened.error is None:
        token = request.app[CAPABILITIES].token(opened.session_id)
        opened = replace(opened, token=token, lease_s=request.app[CONFIG].session_ttl_s)
    return to_json(opened)


def reply(payload: Any) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), content_type="application/json")
