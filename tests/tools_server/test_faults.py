"""What fails around a server: models that answer nonsense or never, the clock, a stop with calls under way."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time

import aiohttp
import pytest
from aiohttp import web
from fake_endpoint import completion, endpoint, half_json

from tools_server.app import make_app
from tools_server.config import ServerConfig
from tools_server.keys import SESSIONS

JSON = {"Content-Type": "application/json"}
SAY = {"kind": "constant", "answer": "yes"}


def chat(url, **options):
    prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
    return {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 1, "backoff_s": 0.01, **prices, **options}


@contextlib.asynccontextmanager
async def serving(**config):
    """Its sessions, and a function that posts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JORCH_TOOLS_TOKEN", raising=False)
        app = make_app(ServerConfig.model_validate(config))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:

            async def post(path, payload):
                async with http.post(path, json=payload) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    return answer

            yield app[SESSIONS], post
    finally:
        await runner.cleanup()


async def open_session(post, name="a", **setup):
    session = {"session_id": name, "environment": "tools", "setup": setup}
    [opened] = (await post("/v1/sessions", {"sessions": [session]}))["sessions"]
    assert opened["error"] is None


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, b"oops"),
        (429, {"Retry-After": "0"}, b"slow down"),
        half_json(),
        (200, JSON, b"[" * 10_000_000),
        (200, JSON, json.dumps(completion("x" * 10_000_000)).encode()),
        "hang",
    ],
    ids=["500", "429", "half a JSON", "10 MB of brackets", "10 MB", "hang"],
)
def test_no_fault_of_a_model_becomes_a_reward(fault):
    """Neither for the session that asked, nor for one whose judge it is; another session is not touched."""

    async def main():
        async with endpoint(fault) as (fake, url):
            expert = chat(url, timeout_s=0.2 if fault == "hang" else 10, breaker_failures=100)
            async with serving(tools={"expert": expert, "say": SAY}) as (sessions, post):
                await open_session(post, "a", verifier={"kind": "exact", "answers": ["x"]})
                await open_session(post, "b")
                call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
                [result] = (await post("/v1/calls", {"calls": [{"session_id": "a", **call}]}))["results"]
                assert (result["error"], result["cost_usd"], result["ended"]) == ("infra_error", 0.0, True)
                assert len(result["content"]) < 500
                other = {"session_id": "b", "call_id": "0", "name": "say", "arguments": {}}
                [result] = (await post("/v1/calls", {"calls": [other]}))["results"]
                assert result["error"] is None
                records = (await post("/v1/finish", {"session_ids": ["a", "b"]}))["records"]
                assert [(r["outcome"], r["error"]) for r in records] == [(0.0, "infra_error"), (0.0, None)]
                assert (len(sessions), len(sessions.deadlines)) == (0, 0)
                assert len(fake.requests) == 2

    asyncio.run(main())


@pytest.mark.parametrize("jump_s", [1e9, -1e9])
def test_a_jump_of_the_clock_changes_nothing(monkeypatch, jump_s):
    """Leases, latencies and deadlines follow a clock that nobody sets; the date that people see may do as it likes."""

    async def slow(request):
        await asyncio.sleep(0.2)
        return completion("x")

    async def main():
        async with endpoint(slow) as (_, url):
            async with serving(tools={"expert": chat(url)}, session_ttl_s=100) as (sessions, post):
                await open_session(post)
                call = {
                    "session_id": "a",
                    "call_id": "0",
                    "name": "expert",
                    "arguments": {"prompt": "x"},
                    "deadline_s": 9,
                }
                answer = asyncio.create_task(post("/v1/calls", {"calls": [call]}))
                await asyncio.sleep(0.05)
                real = time.time
                monkeypatch.setattr(time, "time", lambda: real() + jump_s)
                [result] = (await answer)["results"]
                sessions.forget_idle()
                assert (result["error"], len(sessions)) == (None, 1)
                assert 0.15 < result["latency_s"] < 5
                [record] = (await post("/v1/finish", {"session_ids": ["a"]}))["records"]
                assert record["error"] is None

    asyncio.run(main())


@pytest.mark.slow
def test_sigterm_ends_calls_that_would_never_end(tmp_path):
    """A model that hangs: its connection is closed, the caller has an answer, and the status is 0."""

    async def main():
        async with endpoint("hang") as (fake, url):
            config = {"tools": {"expert": chat(url, timeout_s=600)}, "traces": str(tmp_path / "traces.jsonl")}
            (tmp_path / "server.yaml").write_text(json.dumps(config))
            environment = {key: value for key, value in os.environ.items() if key != "JORCH_TOOLS_TOKEN"}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tools_server", str(tmp_path / "server.yaml"), "--port", "0"),
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
            try:
                address = (await process.stdout.readline()).decode().split()[-1]
                async with aiohttp.ClientSession(address) as http:

                    async def post(path, payload):
                        async with http.post(path, json=payload) as response:
                            return await response.json()

                    await open_session(post)
                    call = {"session_id": "a", "call_id": "0", "name": "expert", "arguments": {"prompt": "x"}}
                    answer = asyncio.create_task(post("/v1/calls", {"calls": [call]}))
                    while not fake.at_once:
                        await asyncio.sleep(0.01)
                    process.send_signal(signal.SIGTERM)
                    assert await asyncio.wait_for(process.wait(), timeout=30) == 0
                    assert (await answer)["results"][0]["error"] == "cancelled"
                while fake.at_once:
                    await asyncio.sleep(0.01)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    assert (tmp_path / "traces.jsonl").read_bytes() == b""  # nothing was judged
