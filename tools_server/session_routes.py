"""Routes of one session alone, /v1/sessions/ID/...: for clients that hold its token, and balancers that route by it."""

from typing import Any

from aiohttp import web

from tools_server.authorisation import allow_server_only, allow_session
from tools_server.errors import BadRequest
from tools_server.keys import SESSIONS, opened_json, reply, settle
from tools_server.requests import read_items, read_object, to_integer, to_record
from tools_server.session import Answer
from tools_server.wire import Call, CallResult, ForkSession, OpenSession, to_json


def accept_calls(request: web.Request, calls: list[Call]) -> list[Answer[CallResult]]:
    """In the order of `calls`. Raises Busy before any of them is accepted."""
    sessions = request.app[SESSIONS]
    sessions.admit_calls(len(calls))
    return [sessions.call(call) for call in calls]


async def open_one(request: web.Request) -> web.Response:
    allow_server_only(request)
    wanted = await read_object(request, "environment", "setup", "seed", "preference")
    session = to_record(wanted | {"session_id": request.match_info["id"]}, "session", OpenSession)
    sessions = request.app[SESSIONS]
    sessions.admit_sessions([session.session_id])
    [opened] = await settle(request, [sessions.open(session)])
    return reply(opened_json(request, opened))


async def call_one(request: web.Request) -> web.Response:
    name = _own_session(request)
    call = await read_object(request, "call_id", "name", "arguments", "deadline_s")
    [result] = await settle(request, accept_calls(request, [to_record(call | {"session_id": name}, "call", Call)]))
    return reply(to_json(result))


async def call_batch(request: web.Request) -> web.Response:
    """Calls that write are carried out in order, others side by side."""
    name = _own_session(request)
    calls = []
    for i, item in enumerate(await read_items(request, "calls")):
        if not isinstance(item, dict) or "session_id" in item:
            raise BadRequest(f"calls[{i}]: expected an object without session_id")
        calls.append(to_record(item | {"session_id": name}, f"calls[{i}]", Call))
    return reply({"results": [to_json(result) for result in await settle(request, accept_calls(request, calls))]})


async def renew_lease(request: web.Request) -> web.Response:
    name = _own_session(request)
    await read_object(request)
    return reply(to_json(request.app[SESSIONS].renew(name)))


async def take_snapshot(request: web.Request) -> web.Response:
    name = _own_session(request)
    await read_object(request)
    return reply(to_json(await request.app[SESSIONS].snapshot(name)))


async def restore_session(request: web.Request) -> web.Response:
    allow_server_only(request)
    wanted = await read_object(request, "num_calls")
    restored = await request.app[SESSIONS].restore(request.match_info["id"], _integer(wanted, "num_calls"))
    return reply(to_json(restored))


async def fork_session(request: web.Request) -> web.Response:
    allow_server_only(request)
    wanted = await read_object(request, "new_session_id", "num_calls")
    fork = to_record(wanted | {"session_id": request.match_info["id"]}, "fork", ForkSession)
    sessions = request.app[SESSIONS]
    sessions.admit_sessions([fork.new_session_id])
    [opened] = await settle(request, [sessions.fork(fork)])
    return reply(opened_json(request, opened))


async def finish_session(request: web.Request) -> web.Response:
    name = _own_session(request)
    await read_object(request)
    [record] = await settle(request, [request.app[SESSIONS].finish(name)])
    return reply(to_json(record))


async def delete_session(request: web.Request) -> web.Response:
    allow_server_only(request)
    return reply({"deleted": request.app[SESSIONS].delete(request.match_info["id"])})


ROUTES = (
    web.put("/v1/sessions/{id}", open_one),
    web.post("/v1/sessions/{id}/call", call_one),
    web.post("/v1/sessions/{id}/call_batch", call_batch),
    web.post("/v1/sessions/{id}/heartbeat", renew_lease),
    web.post("/v1/sessions/{id}/snapshot", take_snapshot),
    web.post("/v1/sessions/{id}/restore", restore_session),
    web.post("/v1/sessions/{id}/fork", fork_session),
    web.post("/v1/sessions/{id}/finish", finish_session),
    web.delete("/v1/sessions/{id}", delete_session),
)


def _own_session(request: web.Request) -> str:
    """The session of the path. Raises HTTPForbidden where the request bears another one's token."""
    name = request.match_info["id"]
    allow_session(request, name)
    return name


def _integer(payload: dict[str, Any], key: str) -> int:
    value = to_integer(payload.get(key))
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadRequest(f"{key}: expected an integer")
    return value
