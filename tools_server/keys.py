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
    if tasks := _unfinished(answers):
        with request.app[SESSIONS].deadlines.awaited(tasks):
            await _done(tasks)
    settled: list[Any] = [_result(answer) for answer in answers]
    return settled


def _unfinished(answers: Sequence[Answer[Any]]) -> list[asyncio.Future[Any]]:
    return [answer for answer in answers if isinstance(answer, asyncio.Future) and not answer.done()]


async def _done(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """As `asyncio.wait`, which takes twice as long for the one call that most requests carry."""
    if len(tasks) > 1:
        await asyncio.wait(tasks)
        return
    [task] = tasks
    done = asyncio.get_running_loop().create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not done.done():  # the client has gone
            done.set_result(None)

    task.add_done_callback(wake)
    try:
        await done
    finally:
        task.remove_done_callback(wake)


async def reply_each(
    request: web.Request, key: str, answers: Sequence[Answer[T]], encode: Callable[[T], Any] = to_json
) -> web.StreamResponse:
    """{key: [...]} once all are there; to a client that accepts STREAM those of slow tools one by one.

    There each line is a JSON object {position in the request: answer, ...} of what became ready together.
    """
    if STREAM not in request.headers.get("Accept", "") or not _unfinished(answers):
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
