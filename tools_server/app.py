"""The aiohttp application: routes, authorisation, and a batch's way from JSON to `sessions.py` and back."""

import asyncio
import contextlib
import functools
import hmac
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from aiohttp import web

from tools_server.config import TOKEN_VARIABLE, ServerConfig
from tools_server.errors import BadRequest, errors_as_json
from tools_server.mcp_facade import McpFacade
from tools_server.metrics import CONTENT_TYPE
from tools_server.sandbox.remote import PATH as PROGRAMS_PATH
from tools_server.sandbox.remote import serve_program
from tools_server.sessions import Answer, Sessions
from tools_server.tool import hermes_text
from tools_server.wire import API_VERSION, MAX_ITEMS, Call, ForkSession, OpenSession, to_json

T = TypeVar("T")
CONFIG = web.AppKey("CONFIG", ServerConfig)
SESSIONS = web.AppKey("SESSIONS", Sessions)
FIELD_TYPES: dict[type, tuple[tuple[str, type], ...]] = {
    OpenSession: (("session_id", str), ("environment", str), ("setup", dict), ("seed", int)),
    ForkSession: (("session_id", str), ("new_session_id", str), ("num_calls", int)),
    Call: (("session_id", str), ("call_id", str), ("name", str), ("arguments", dict)),
}
JSON_TYPES = {str: "a string", dict: "an object", int: "an integer"}


def make_app(config: ServerConfig) -> web.Application:
    """The server's application. The bearer token is read from the environment, once, here."""
    app = web.Application(
        middlewares=[errors_as_json, _authorisation(os.environ.get(TOKEN_VARIABLE, ""))],
        client_max_size=config.max_request_bytes,
    )
    app[CONFIG] = config
    app[SESSIONS] = Sessions(config)
    app.add_routes(
        [
            web.post("/v1/sessions", open_sessions),
            web.post("/v1/calls", call_tools),
            web.post("/v1/forks", fork_sessions),
            web.post("/v1/finish", finish_sessions),
            web.post(PROGRAMS_PATH, run_program),
            web.get("/v1/experts", list_experts),
            web.get("/v1/tools", list_tools),
            web.get("/healthz", report_health),
            web.get("/readyz", report_readiness),
            web.get("/metrics", report_metrics),
        ]
    )
    app.cleanup_ctx.append(_run_sessions)
    if config.tools:
        _add_mcp(app)
    return app


async def open_sessions(request: web.Request) -> web.Response:
    wanted = _records(await _items(request, "sessions"), "sessions", OpenSession)
    opened = await _settle([request.app[SESSIONS].open(session) for session in wanted])
    return _reply({"sessions": [to_json(session) for session in opened]})


async def fork_sessions(request: web.Request) -> web.Response:
    forks = _records(await _items(request, "forks"), "forks", ForkSession)
    opened = await _settle([request.app[SESSIONS].fork(fork) for fork in forks])
    return _reply({"sessions": [to_json(session) for session in opened]})


async def call_tools(request: web.Request) -> web.Response:
    """Answers when the slowest call of the batch has its result."""
    calls = _records(await _items(request, "calls"), "calls", Call)
    results = await _settle([request.app[SESSIONS].call(call) for call in calls])
    return _reply({"results": [to_json(result) for result in results]})


async def finish_sessions(request: web.Request) -> web.Response:
    names = await _items(request, "session_ids")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise BadRequest(f"session_ids[{i}]: expected a string, got {type(name).__name__}")
    records = await _settle([request.app[SESSIONS].finish(name) for name in names])
    return _reply({"records": [to_json(record) for record in records]})


async def run_program(request: web.Request) -> web.Response:
    """For another server's tool of kind `remote_python`."""
    try:
        payload = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return _reply(await serve_program(payload, request.app[SESSIONS].toolbox.runners()))


async def list_experts(request: web.Request) -> web.Response:
    experts = request.app[CONFIG].experts
    return _reply({"experts": {name: profile.model_dump() for name, profile in experts.items()}})


async def list_tools(request: web.Request) -> web.Response:
    """The configured tools as OpenAI function schemas, or with `?format=hermes` as text for a system prompt."""
    specs = [tool.spec for tool in request.app[SESSIONS].toolbox.tools.values()]
    match request.query.get("format", "openai"):
        case "openai":
            return _reply({"tools": [spec.openai for spec in specs]})
        case "hermes":
            return web.Response(text=hermes_text(specs))
        case other:
            raise BadRequest(f"format: got {other[:40]!r}, allowed: openai, hermes")


async def report_health(request: web.Request) -> web.Response:
    """Asks for no token: a liveness probe has none."""
    return _reply({"status": "ok", "version": API_VERSION, "sessions": len(request.app[SESSIONS])})


async def report_readiness(request: web.Request) -> web.Response:
    """503 where a load balancer should send no new session; asks for no token."""
    reason = request.app[SESSIONS].unready()
    return web.json_response({"status": reason or "ready"}, status=503 if reason else 200)


async def report_metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[SESSIONS].metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _reply(payload: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(payload).encode(), content_type="application/json")


async def _items(request: web.Request, key: str) -> list[Any]:
    """The list under `key` of the request's JSON object."""
    body = await request.read()
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(payload, dict) or payload.keys() != {key} or not isinstance(payload[key], list):
        raise BadRequest(f'expected {{"{key}": [...]}} and nothing else')
    if len(payload[key]) > MAX_ITEMS:
        raise BadRequest(f"{key}: got {len(payload[key])} items, at most {MAX_ITEMS} are allowed in a request")
    return payload[key]


def _records(items: list[Any], key: str, kind: type[T]) -> list[T]:
    """`items` as wire records. Hand-written checks, because this runs once per call."""
    records = []
    field_types = FIELD_TYPES[kind]
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRequest(f"{key}[{i}]: expected an object, got {type(item).__name__}")
        try:
            record = kind(**item)
        except TypeError:
            names = ", ".join(name for name, _ in field_types)
            raise BadRequest(f"{key}[{i}]: expected the fields {names}; got {', '.join(item)}") from None
        for name, field_type in field_types:
            if not isinstance(getattr(record, name), field_type):
                raise BadRequest(f"{key}[{i}].{name}: expected {JSON_TYPES[field_type]}")
        records.append(record)
    return records


async def _settle(answers: Sequence[Answer[T]]) -> list[T]:
    """Wait for the answers that are still tasks. A client that goes away cancels none: it may ask again."""
    tasks = [answer for answer in answers if isinstance(answer, asyncio.Future)]
    if tasks:
        await asyncio.wait(tasks)
    settled: list[Any] = [a.result() if isinstance(a, asyncio.Future) else a for a in answers]
    return settled


def _authorisation(token: str) -> Any:
    expected = f"Bearer {token}".encode()

    @web.middleware
    async def check_token(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if token and request.path not in ("/healthz", "/readyz") and not hmac.compare_digest(given, expected):
            raise web.HTTPUnauthorized(reason=f"wrong or missing bearer token (set {TOKEN_VARIABLE})")
        return await handler(request)

    return check_token


def _add_mcp(app: web.Application) -> None:
    """The tools at /mcp, where the extra mcp is installed."""
    with contextlib.suppress(ImportError):
        facade = McpFacade(app[SESSIONS].toolbox)
        app.router.add_post("/mcp", facade.handle)
        app.cleanup_ctx.append(functools.partial(_run_facade, facade))


async def _run_facade(facade: McpFacade, app: web.Application) -> AsyncIterator[None]:
    async with facade.running():
        yield


async def _run_sessions(app: web.Application) -> AsyncIterator[None]:
    """Forget idle sessions as long as the server runs."""
    await app[SESSIONS].toolbox.start()
    interval_s = min(app[CONFIG].session_ttl_s / 4, 60.0)

    async def forget_repeatedly() -> None:
        while True:
            await asyncio.sleep(interval_s)
            app[SESSIONS].forget_idle()

    watchers = [asyncio.create_task(forget_repeatedly()), asyncio.create_task(app[SESSIONS].metrics.watch_lag())]
    yield
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    await app[SESSIONS].close()
