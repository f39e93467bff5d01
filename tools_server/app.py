"""The aiohttp application: routes, and a batch's way from JSON to `sessions.py` and back."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from functools import partial

from aiohttp import web

from tools_server import openapi, session_routes
from tools_server.authorisation import Capabilities, allow_server_only, allow_session, authorisation
from tools_server.config import TOKEN_VARIABLE, ServerConfig
from tools_server.errors import BadRequest, errors_as_json
from tools_server.keys import CAPABILITIES, CONFIG, SESSIONS, opened_json, reply, reply_each
from tools_server.mcp_facade import McpFacade
from tools_server.metrics import CONTENT_TYPE
from tools_server.requests import read_items, read_object, to_records
from tools_server.reward_groups import scored, to_group
from tools_server.sandbox.remote import PATH as PROGRAMS_PATH
from tools_server.sandbox.remote import REQUEST_FIELDS, serve_program
from tools_server.sessions import Sessions
from tools_server.tool import hermes_text
from tools_server.wire import API_VERSION, Call, ForkSession, OpenSession, to_json


def make_app(config: ServerConfig) -> web.Application:
    """The server's application. The bearer token is read from the environment, once, here."""
    capabilities, sessions = Capabilities(), Sessions(config)
    check_token = authorisation(os.environ.get(TOKEN_VARIABLE, ""), capabilities)
    app = web.Application(
        middlewares=[*sessions.spans.middlewares, errors_as_json, check_token],
        client_max_size=config.max_request_bytes,
    )
    app[CONFIG] = config
    app[CAPABILITIES] = capabilities
    app[SESSIONS] = sessions
    app.add_routes(
        [
            web.post("/v1/sessions", open_sessions),
            web.post("/v1/calls", call_tools),
            web.post("/v1/forks", fork_sessions),
            web.post("/v1/finish", finish_sessions),
            web.post("/v1/rewards", reward_groups),
            web.post("/v1/heartbeats", renew_leases),
            *session_routes.ROUTES,
            web.post(PROGRAMS_PATH, run_program),
            web.get("/v1/experts", list_experts),
            web.get("/v1/tools", list_tools),
            web.get("/v1/openapi.json", describe_api),
            web.get("/healthz", report_health),
            web.get("/readyz", report_readiness),
            web.get("/metrics", report_metrics),
        ]
    )
    app.cleanup_ctx.append(_run_sessions)
    if config.tools:
        _add_mcp(app)
    return app


async def open_sessions(request: web.Request) -> web.StreamResponse:
    allow_server_only(request)
    wanted = to_records(await read_items(request, "sessions"), "sessions", OpenSession)
    sessions = request.app[SESSIONS]
    sessions.admit_sessions(session.session_id for session in wanted)
    opening = [sessions.open(session) for session in wanted]
    return await reply_each(request, "sessions", opening, partial(opened_json, request))


async def fork_sessions(request: web.Request) -> web.StreamResponse:
    allow_server_only(request)
    forks = to_records(await read_items(request, "forks"), "forks", ForkSession)
    sessions = request.app[SESSIONS]
    sessions.admit_sessions(fork.new_session_id for fork in forks)
    opening = [sessions.fork(fork) for fork in forks]
    return await reply_each(request, "sessions", opening, partial(opened_json, request))


async def call_tools(request: web.Request) -> web.StreamResponse:
    calls = to_records(await read_items(request, "calls"), "calls", Call)
    for call in calls:
        allow_session(request, call.session_id)
    return await reply_each(request, "results", session_routes.accept_calls(request, calls))


async def finish_sessions(request: web.Request) -> web.StreamResponse:
    names = await _own_sessions(request)
    return await reply_each(request, "records", [request.app[SESSIONS].finish(name) for name in names])


async def reward_groups(request: web.Request) -> web.Response:
    allow_server_only(request)
    groups = [to_group(item, f"groups[{i}]") for i, item in enumerate(await read_items(request, "groups"))]
    return reply({"rewards": [[to_json(reward) for reward in scored(group)] for group in groups]})


async def renew_leases(request: web.Request) -> web.Response:
    sessions = request.app[SESSIONS]
    return reply({"renewed": [sessions.renew_if_open(name) for name in await _own_sessions(request)]})


async def run_program(request: web.Request) -> web.Response:
    """For another server's tool of kind `remote_python`."""
    allow_server_only(request)
    payload = await read_object(request, *REQUEST_FIELDS)
    return reply(await serve_program(payload, request.app[SESSIONS].toolbox.runners()))


async def list_experts(request: web.Request) -> web.Response:
    experts = request.app[CONFIG].experts
    return reply({"experts": {name: profile.model_dump() for name, profile in experts.items()}})


async def list_tools(request: web.Request) -> web.Response:
    """The configured tools as OpenAI function schemas, or with `?format=hermes` as text for a system prompt."""
    specs = [tool.spec for tool in request.app[SESSIONS].toolbox.tools.values()]
    match request.query.get("format", "openai"):
        case "openai":
            return reply({"tools": [spec.openai for spec in specs]})
        case "hermes":
            return web.Response(text=hermes_text(specs))
        case other:
            raise BadRequest(f"format: got {other[:40]!r}, allowed: openai, hermes")


async def describe_api(request: web.Request) -> web.Response:
    return reply(openapi.document())


async def report_health(request: web.Request) -> web.Response:
    """Asks for no token: a liveness probe has none."""
    sessions, lease_s = len(request.app[SESSIONS]), request.app[CONFIG].session_ttl_s
    return reply({"status": "ok", "version": API_VERSION, "sessions": sessions, "lease_s": lease_s})


async def report_readiness(request: web.Request) -> web.Response:
    """503 where a load balancer should send no new session; asks for no token."""
    reason = request.app[SESSIONS].unready()
    return web.json_response({"status": reason or "ready"}, status=503 if reason else 200)


async def report_metrics(request: web.Request) -> web.Response:
    allow_server_only(request)
    return web.Response(body=request.app[SESSIONS].metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def _own_sessions(request: web.Request) -> list[str]:
    """The request's `session_ids`. Raises HTTPForbidden where it bears another session's token."""
    names = await read_items(request, "session_ids")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise BadRequest(f"session_ids[{i}]: expected a string, got {type(name).__name__}")
        allow_session(request, name)
    return names


def _add_mcp(app: web.Application) -> None:
    """The tools at /mcp, where the extra mcp is installed."""
    with contextlib.suppress(ImportError):
        facade = McpFacade(app[SESSIONS].toolbox)
        app.router.add_post("/mcp", facade.handle)
        app.cleanup_ctx.append(partial(_run_facade, facade))


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
