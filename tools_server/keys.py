"""What an application holds, and what all its handlers do: wait for answers, and reply."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from aiohttp import web

from tools_server.authorisation import Capabilities
from tools_server.config import ServerConfig
from tools_server.session import Answer
from tools_server.sessions import Sessions
from tools_server.wire import SessionOpened, to_json

T = TypeVar("T")
CONFIG = web.AppKey("CONFIG", ServerConfig)
SESSIONS = web.AppKey("SESSIONS", Sessions)
CAPABILITIES = web.AppKey("CAPABILITIES", Capabilities)


async def settle(request: web.Request, answers: Sequence[Answer[T]]) -> list[T]:
    """Wait for the answers that are still tasks. A client that goes away cancels none at once: it may ask again."""
    tasks = [answer for answer in answers if isinstance(answer, asyncio.Future) and not answer.done()]
    if tasks:
        await request.app[SESSIONS].deadlines.wait(tasks)
    settled: list[Any] = [a.result() if isinstance(a, asyncio.Future) else a for a in answers]
    return settled


def opened_json(request: web.Request, opened: SessionOpened) -> dict[str, Any]:
    """With the session's token, where it is open."""
    if opened.error is None:
        token = request.app[CAPABILITIES].token(opened.session_id)
        opened = replace(opened, token=token, lease_s=request.app[CONFIG].session_ttl_s)
    return to_json(opened)


def reply(payload: Any) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), content_type="application/json")
