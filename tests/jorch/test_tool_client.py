"""The client against real servers: the tool server in this process or its own, and servers that misbehave."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web

from jorch.rollout import tool_client
from jorch.rollout.tool_client import ToolClient, ToolServerDown
from tools_server.app import make_app
from tools_server.config import ServerConfig
from tools_server.keys import SESSIONS
from tools_server.session import Session
from tools_server.wire import Call, OpenSession

PROFILE = {
    "kind": "simulated",
    "skill": {"default": 1},
    "usd_per_million_tokens": 1.0,
    "tokens_per_call": 1000,
    "latency_s": 1.0,
}
CONFIG = ServerConfig.model_validate({"experts": {"e": PROFILE}})
SETUP = {"model_mapping": {"search-1": "e", "answer-1": "e"}, "simulation": {"difficulty": 1}}


@pytest.fixture(autouse=True)
def _short_backoff_and_no_token(monkeypatch):
    monkeypatch.setattr(tool_client, "BACKOFF_S", 0.01)
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)


@contextlib.asynccontextmanager
async def serving(app):
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def misbehaving(*handlers):
    """A server whose POSTs are answered by `handlers` in turn, the last one for ever; its health is good."""
    app = web.Application()
    num_posts = 0

    async def post(request):
        nonlocal num_posts
        num_posts += 1
        return await handlers[min(num_posts, len(handlers)) - 1](request)

    async def health(request):
        return web.json_response({"version": 1})

    app.add_routes([web.get("/healthz", health), web.post("/{path:.*}", post)])
    return app


async def fail_503(request):
    return web.json_response({"error": "too busy"}, status=503)


async def hang(request):
    await asyncio.sleep(30)
    return web.Response()


async def disconnect(request):
    request.transport.close()
    return web.Response()


async def greet(request):
    return web.Response(text="hello")


async def finish_properly(request):
    names = (await request.json())["session_ids"]
    zero = {"outcome": 0.0, "cost_usd": 0.0, "latency_s": 0.0, "tool_counts": {}}
    return web.json_response({"records": [{"session_id": name, **zero} for name in names]})


def finish_against(app, retries=2, timeout_s=10.0):
    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=timeout_s, retries=retries) as client:
            return url, await asyncio.gather(client.finish("a"), client.finish("b"), return_exceptions=True)

    return asyncio.run(main())


def test_many_trajectories_play_through_few_requests():
    app = make_app(CONFIG)
    paths = []

    @web.middleware
    async def count(request, handler):
        paths.append(request.path)
        return await handler(request)

    app.middlewares.append(count)

    async def trajectory(client, i):
        name = f"t{i}"
        opened = await client.open(OpenSession(name, "experts", SETUP))
        assert (opened.session_id, opened.error) == (name, None)
        found = await client.call(Call(name, "0", "search", {"model": "search-1"}))
        assert (found.session_id, found.tool, found.content) == (name, "search-1", "documents")
        await client.call(Call(name, "1", "answer", {"model": "answer-1"}))
        return await client.finish(name)

    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=30, retries=0) as client:
            return await asyncio.gather(*[trajectory(client, i) for i in range(600)])

    records = asyncio.run(main())
    assert [record.session_id for record in records] == [f"t{i}" for i in range(600)]
    assert {(record.outcome, record.cost_usd) for record in records} == {(1.0, 0.002)}
    assert paths.count("/v1/sessions") == 2  # 600 in one tick, at most 512 in a request
    # Two requests a turn, and some more where the smaller batch falls behind and meets the other's next turn.
    assert 1 + 4 * 2 <= len(paths) <= 4 * 4 * 2


def test_no_call_waits_for_a_slower_one_of_the_same_tick():
    slow = PROFILE | {"latency_s": 60.0}
    app = make_app(ServerConfig.model_validate({"experts": {"e": PROFILE, "slow": slow}, "time_scale": 0.01}))
    num_requests = 0

    @web.middleware
    async def count(request, handler):
        nonlocal num_requests
        num_requests += request.path == "/v1/calls"
        return await handler(request)

    app.middlewares.append(count)

    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=30, retries=0) as client:
            for name, expert in (("a", "slow"), ("b", "e"), ("c", "e")):
                await client.open(OpenSession(name, "experts", SETUP | {"model_mapping": {"search-1": expert}}))
            calls = [Call(name, "0", "search", {"model": "search-1"}) for name in "abc"]
            late, *early = [asyncio.create_task(client.call(call)) for call in calls]
            found = await asyncio.gather(*early)
            assert not late.done()
            return [await late, *found]

    results = asyncio.run(main())
    assert [(r.session_id, r.latency_s) for r in results] == [("a", 60.0), ("b", 1.0), ("c", 1.0)]
    assert num_requests == 1


def test_answers_that_came_before_a_connection_broke_are_kept_and_the_others_asked_for_again():
    zero = {"outcome": 0.0, "cost_usd": 0.0, "latency_s": 0.0, "tool_counts": {}}

    async def break_off(request):
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(json.dumps({"1": {"session_id": "first answer", **zero}}).encode() + b'\n{"0": {"sess')
        await asyncio.sleep(0.05)
        request.transport.abort()
        return response

    _, records = finish_against(misbehaving(break_off, finish_properly))
    assert [record.session_id for record in records] == ["a", "first answer"]


def test_a_failure_after_the_first_answers_is_told_to_its_waiter_alone(monkeypatch):
    slow = PROFILE | {"latency_s": 40.0}
    app = make_app(ServerConfig.model_validate({"experts": {"e": PROFILE, "slow": slow}, "time_scale": 0.01}))
    book = Session._book

    def fail_for_b(session, call, observation):
        if call.session_id == "b":
            raise RuntimeError("a bug")
        return book(session, call, observation)

    monkeypatch.setattr(Session, "_book", fail_for_b)

    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=10, retries=1) as client:
            for name, expert in (("a", "e"), ("b", "slow")):
                await client.open(OpenSession(name, "experts", SETUP | {"model_mapping": {"search-1": expert}}))
            calls = [Call(name, "0", "search", {"model": "search-1"}) for name in "ab"]
            return await asyncio.gather(*map(client.call, calls), return_exceptions=True)

    found, failed = asyncio.run(main())
    assert found.content == "documents"
    assert "(2 attempts at /v1/calls): HTTP 500: RuntimeError: a bug" in str(failed)


def test_a_full_server_is_waited_for():
    """Thirty trajectories on a server for four: it never holds more, and each has its turn."""
    app = make_app(CONFIG.model_copy(update={"max_sessions": 4}))
    statuses, most = [], 0

    @web.middleware
    async def watch(request, handler):
        nonlocal most
        response = await handler(request)
        statuses.append(response.status)
        most = max(most, len(app[SESSIONS]))
        return response

    app.middlewares.insert(0, watch)

    async def trajectory(client, name):
        await client.open(OpenSession(name, "experts", SETUP))
        await client.call(Call(name, "0", "answer", {"model": "answer-1"}))
        return await client.finish(name)

    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=30, retries=0) as client:
            return await asyncio.gather(*[trajectory(client, f"t{i}") for i in range(30)])

    assert [record.tool_counts for record in asyncio.run(main())] == [{"answer-1": 1}] * 30
    assert most == 4
    assert set(statuses) == {200, 429}


def test_a_server_that_stays_full_is_down(monkeypatch):
    monkeypatch.setattr(tool_client, "BUSY_S", 0.1)

    async def full(request):
        return web.json_response({"error": "4 sessions are open"}, status=429)

    _, errors = finish_against(misbehaving(full))
    for error in errors:
        assert isinstance(error, ToolServerDown)
        assert "no room for 0.1 s: 4 sessions are open" in str(error)


def test_failures_of_the_network_and_of_the_server_are_retried():
    _, records = finish_against(misbehaving(fail_503, disconnect, finish_properly))
    assert [record.session_id for record in records] == ["a", "b"]


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (fail_503, "HTTP 503: too busy"),
        (hang, "no answer within 0.2 s"),
        (disconnect, "Server disconnected"),
    ],
)
def test_after_all_retries_every_waiter_learns_address_and_reason(handler, reason):
    url, errors = finish_against(misbehaving(handler), timeout_s=0.2)
    for error in errors:
        assert isinstance(error, ToolServerDown)
        assert f"tool server {url} does not answer (3 attempts at /v1/finish): {reason}" in str(error)
    assert errors[0] is not errors[1]


def test_an_address_without_a_server_is_down_at_once():
    async def main():
        async with ToolClient("http://127.0.0.1:9", timeout_s=5, retries=0):
            raise AssertionError

    with pytest.raises(ToolServerDown, match=r"http://127\.0\.0\.1:9 does not answer \(1 attempt at /healthz\)"):
        asyncio.run(main())


def test_mistakes_are_not_retried(monkeypatch):
    _, errors = finish_against(misbehaving(greet))
    assert all("is no tool server: /v1/finish did not answer with JSON" in str(error) for error in errors)
    with pytest.raises(ValueError, match="got 'localhost:8900', expected an address"):
        ToolClient("localhost:8900", timeout_s=1, retries=0)

    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "right")
    app = make_app(CONFIG)
    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "wrong")
    url, errors = finish_against(app)
    for error in errors:
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"tool server {url} refused /v1/finish (HTTP 401): wrong or missing bearer")
        assert "right" not in str(error)


def test_the_token_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "right")
    _, records = finish_against(make_app(CONFIG))
    assert [record.error for record in records] == ["unknown_session"] * 2


def test_a_batch_that_the_server_refuses_shows_its_line():
    async def main():
        async with serving(make_app(CONFIG)) as url, ToolClient(url, timeout_s=10, retries=2) as client:
            await client.call(Call("a", "0", "search", "model"))

    with pytest.raises(ValueError, match=r"\(HTTP 400\): calls\[0\]\.arguments: expected an object"):
        asyncio.run(main())


def test_a_cancelled_waiter_leaves_its_batch_alone():
    async def main():
        async with serving(make_app(CONFIG)) as url, ToolClient(url, timeout_s=10, retries=0) as client:
            leaver, stayer = [asyncio.create_task(client.finish(name)) for name in "ab"]
            await asyncio.sleep(0)
            leaver.cancel()
            return await asyncio.gather(leaver, stayer, return_exceptions=True)

    left, record = asyncio.run(main())
    assert isinstance(left, asyncio.CancelledError)
    assert record.session_id == "b"


def test_leaving_the_client_cancels_what_is_under_way():
    async def main():
        async with serving(misbehaving(hang)) as url:
            async with ToolClient(url, timeout_s=30, retries=0) as client:
                waiter = asyncio.create_task(client.finish("a"))
                await asyncio.sleep(0.05)
            await asyncio.wait([waiter], timeout=10)
            return waiter.cancelled()

    assert asyncio.run(main())


@pytest.mark.slow
def test_a_session_that_is_kept_outlives_its_lease_and_no_other_does():
    app = make_app(ServerConfig.model_validate({"experts": {"e": PROFILE}, "session_ttl_s": 1.5}))

    async def main():
        async with serving(app) as url, ToolClient(url, timeout_s=10, retries=0) as client:
            for name in ("kept", "left"):
                await client.open(OpenSession(name, "experts", SETUP))
            with client.keep("kept"):
                await asyncio.sleep(3.75)
                calls = [
                    await client.call(Call(name, "0", "search", {"model": "search-1"})) for name in ("kept", "left")
                ]
            await asyncio.sleep(3.75)
            return [call.error for call in calls], len(app[SESSIONS])

    assert asyncio.run(main()) == ([None, "unknown_session"], 0)


@pytest.fixture
def server_processes(tmp_path):
    """Starts the real server on a port; what a failing test leaves is killed."""
    (tmp_path / "server.yaml").write_text("experts:\n  e: " + str(PROFILE).replace("'", "") + "\n")
    children = []

    def start(port):
        command = [sys.executable, "-m", "tools_server", "--config", str(tmp_path / "server.yaml")]
        child = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        return child, child.stdout

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_a_server_killed_mid_run_is_named_and_a_restarted_one_has_lost_its_sessions(server_processes, monkeypatch):
    child, stdout = server_processes(0)
    url = stdout.readline().split()[-1]
    search = Call("a", "0", "search", {"model": "search-1"})

    async def main():
        async with ToolClient(url, timeout_s=10, retries=1) as client:
            await client.open(OpenSession("a", "experts", SETUP))
            assert (await client.call(search)).error is None
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            with pytest.raises(ToolServerDown, match=f"tool server {url} does not answer .2 attempts at /v1/calls"):
                await client.call(search)
        monkeypatch.setattr(tool_client, "BACKOFF_S", 0.1)
        server_processes(int(url.rsplit(":", 1)[1]))
        async with ToolClient(url, timeout_s=10, retries=9) as client:  # within these retries it is back
            assert (await client.health())["sessions"] == 0
            lost = await client.call(search)
            record = await client.finish("a")
        assert (lost.error, lost.ended, record.error) == ("unknown_session", True, "unknown_session")

    asyncio.run(main())


def test_a_failure_that_nobody_waits_for_any_more_is_not_logged(caplog):
    """As when trajectories are cancelled before they await the session that they opened."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def main():
        client = ToolClient(url, timeout_s=10, retries=0)
        async with aiohttp.ClientSession() as client._http:
            opening = client.open(OpenSession("a", "experts", SETUP))
            await asyncio.wait([opening])
            assert opening.done()

    asyncio.run(main())
    gc.collect()
    assert "never retrieved" not in caplog.text
