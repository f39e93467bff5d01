"""Processes killed at the worst moment, clients that go away, requests that make no sense: nothing leaks, nothing is a 500."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from server_processes import survivors

from tools_server.app import make_app
from tools_server.config import ServerConfig

NULL = {
    "kind": "constant",
    "answer": "yes",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
EXPERT = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 1,
    "tokens_per_call": 100,
    "latency_s": 0.1,
}
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (Debian package bubblewrap)")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server process with a python tool and a token: (process, url, headers)."""
    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "sesame")
    config = {
        "tools": {"python": {"kind": "python", "sandboxes": 2, "timeout_s": 20}},
        "traces": str(tmp_path / "t.jsonl"),
    }
    (tmp_path / "server.yaml").write_text(json.dumps(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "tools_server", str(tmp_path / "server.yaml"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    url = process.stdout.readline().split()[-1]
    yield process, url, {"Authorization": "Bearer sesame"}
    process.kill()
    process.wait()
    process.stdout.close()


def sandboxes_of(pid):
    """Process ids of everything below `pid`."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()[1:]]
    below, found = {pid}, True
    while found:
        found = {int(p) for p, parent, state in rows if int(parent) in below and state[0] != "Z"} - below
        below |= found
    return below - {pid}


async def post(http, path, payload):
    async with http.post(path, json=payload) as response:
        return response.status, await response.json()


async def start_program(http, server_pid, code):
    """The task of a call that runs `code`, which has begun."""
    await post(http, "/v1/sessions", {"sessions": [{"session_id": "a", "environment": "tools", "setup": {}}]})
    call = {"session_id": "a", "call_id": "0", "name": "python", "arguments": {"code": renamed(code)}}
    answer = asyncio.create_task(post(http, "/v1/calls", {"calls": [call]}))
    async with asyncio.timeout(15):
        while not any(is_begun(pid) for pid in sandboxes_of(server_pid)):
            await asyncio.sleep(0.02)
    return answer


def renamed(code):
    """A program that runs `code` in a process which `is_begun` knows by its name."""
    return f"import os; os.execv('/usr/bin/python3', ['begun', '-c', {code!r}])"


def is_begun(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"begun\0")
    return False


@needs_bwrap
def test_a_killed_server_leaves_no_sandbox(server):
    process, url, headers = server

    async def main():
        async with aiohttp.ClientSession(url, headers=headers) as http:
            call = await start_program(http, process.pid, "import time; time.sleep(60)")
            sandboxes = sandboxes_of(process.pid)
            process.kill()
            with pytest.raises(aiohttp.ClientError):
                await call
            return sandboxes

    sandboxes = asyncio.run(main())
    assert len(sandboxes) >= 4  # two of bwrap and one of python for each; the idle one may be starting
    assert not survivors(sandboxes)


@needs_bwrap
def test_sigterm_lets_a_program_end_and_leaves_no_sandbox(server):
    process, url, headers = server

    async def main():
        async with aiohttp.ClientSession(url, headers=headers) as http:
            call = await start_program(http, process.pid, "import time; time.sleep(1.5); print('done')")
            sandboxes = sandboxes_of(process.pid)
            process.send_signal(signal.SIGTERM)
            return await call, sandboxes

    (status, answer), sandboxes = asyncio.run(main())
    assert (status, answer["results"][0]["content"]) == (200, "done")
    assert process.wait(timeout=30) == 0
    assert not survivors(sandboxes)


@needs_bwrap
def test_a_client_that_goes_away_may_come_back_for_its_answer(server):
    process, url, headers = server

    async def main():
        async with aiohttp.ClientSession(url, headers=headers) as http:
            call = await start_program(http, process.pid, "import time; time.sleep(0.5); print(time.time())")
            call.cancel()
        async with aiohttp.ClientSession(url, headers=headers) as http:
            again = {"session_id": "a", "call_id": "0", "name": "python", "arguments": None}
            again["arguments"] = {"code": renamed("import time; time.sleep(0.5); print(time.time())")}
            answers = [(await post(http, "/v1/calls", {"calls": [again]}))[1] for _ in range(2)]
            _, finished = await post(http, "/v1/finish", {"session_ids": ["a"]})
            return answers, finished["records"][0]

    (first, second), record = asyncio.run(main())
    assert first == second
    assert record["tool_counts"] == {"python": 1}


@needs_bwrap
def test_a_sandbox_killed_at_work_is_no_verdict(server):
    process, url, headers = server

    async def main():
        async with aiohttp.ClientSession(url, headers=headers) as http:
            call = await start_program(http, process.pid, "import time; time.sleep(60)")
            for pid in sandboxes_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            _, killed = await call
            _, finished = await post(http, "/v1/finish", {"session_ids": ["a"]})
            await post(http, "/v1/sessions", {"sessions": [{"session_id": "b", "environment": "tools", "setup": {}}]})
            again = {"session_id": "b", "call_id": "0", "name": "python", "arguments": {"code": "print(6 * 7)"}}
            _, after = await post(http, "/v1/calls", {"calls": [again]})
            return killed["results"][0], finished["records"][0], after["results"][0]

    killed, record, after = asyncio.run(main())
    assert (killed["error"], killed["cost_usd"]) == ("infra_error", 0.0)
    assert (record["error"], record["outcome"]) == ("infra_error", 0.0)
    assert (after["error"], after["content"]) == (None, "42")


def test_a_wrong_token_opens_nothing_but_the_health_checks(server):
    _, url, _ = server

    async def main():
        statuses = {}
        async with aiohttp.ClientSession(url, headers={"Authorization": "Bearer Sesame"}) as http:
            for path in ("/v1/tools", "/metrics", "/v1/experts", "/healthz", "/readyz"):
                async with http.get(path) as response:
                    statuses[path] = response.status
            for path in ("/v1/sessions", "/v1/calls", "/v1/finish", "/mcp"):
                async with http.post(path, data=b"{}") as response:
                    statuses[path] = response.status
        return statuses

    statuses = asyncio.run(main())
    assert {path for path, status in statuses.items() if status == 200} == {"/healthz", "/readyz"}
    assert {status for path, status in statuses.items() if path not in ("/healthz", "/readyz")} == {401}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["a", "b", "null", "search", "answer", "python", "tools", "experts", "tau2", "", "\ud800", "x" * 5000]
)
SETUPS = JSON | st.fixed_dictionaries(
    {},
    optional={
        "tools": JSON | st.lists(NAMES, max_size=2),
        "verifier": JSON
        | st.fixed_dictionaries({"kind": st.sampled_from(["exact", "json", "judge", "tests"]), "answers": JSON}),
        "budget": JSON,
        "prices": JSON,
        "question": JSON,
        "model_mapping": JSON,
    },
)
SESSION = st.fixed_dictionaries({"session_id": NAMES, "environment": NAMES, "setup": SETUPS}, optional={"seed": JSON})
CALL = st.fixed_dictionaries({"session_id": NAMES, "call_id": NAMES, "name": NAMES, "arguments": JSON})
GOOD_CALL = st.fixed_dictionaries(
    {
        "session_id": NAMES,
        "call_id": NAMES,
        "name": NAMES,
        "arguments": st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    }
)
REQUESTS = st.one_of(
    st.tuples(st.just("/v1/sessions"), st.fixed_dictionaries({"sessions": st.lists(SESSION | JSON, max_size=3)})),
    st.tuples(st.just("/v1/calls"), st.fixed_dictionaries({"calls": st.lists(GOOD_CALL, max_size=4)})),
    st.tuples(st.just("/v1/calls"), st.fixed_dictionaries({"calls": st.lists(CALL | JSON, max_size=3)})),
    st.tuples(st.just("/v1/finish"), st.fixed_dictionaries({"session_ids": st.lists(NAMES | JSON, max_size=3)})),
    st.tuples(st.sampled_from(["/v1/sessions", "/v1/calls", "/v1/finish", "/mcp"]), JSON),
    st.tuples(st.sampled_from(["/v1/sessions", "/v1/calls", "/v1/finish", "/mcp"]), st.binary(max_size=50)),
    st.tuples(
        st.sampled_from(["/v1/sessions/a/call", "/v1/sessions/null/call_batch", "/v1/sessions/%ED%A0%80/call"]),
        st.fixed_dictionaries({"call_id": NAMES, "name": NAMES, "arguments": JSON}, optional={"deadline_s": JSON}),
    ),
    st.tuples(
        st.sampled_from(["snapshot", "heartbeat", "restore", "fork", "finish"]).map(
            lambda what: f"/v1/sessions/a/{what}"
        ),
        JSON | st.fixed_dictionaries({"num_calls": st.integers(-2, 3)}, optional={"new_session_id": NAMES}),
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_no_request_is_a_500_and_every_session_ends(requests):
    """Any requests at all; then each session that is open can be finished, and none is left."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)
    config = ServerConfig.model_validate({"tools": {"null": NULL}, "experts": {"e": EXPERT}})

    async def main():
        runner = web.AppRunner(make_app(config), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
            for path, payload in requests:
                body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                async with http.post(path, data=body) as response:
                    assert response.status < 500, (path, payload, await response.text())
                    with contextlib.suppress(aiohttp.ContentTypeError):
                        answer = await response.json()
                        for result in answer.get("results", []) if isinstance(answer, dict) else []:
                            assert result["error"] != "env_error", (payload, result)
            names = [
                "a",
                "b",
                "null",
                "search",
                "answer",
                "python",
                "tools",
                "experts",
                "tau2",
                "",
                "\ud800",
                "x" * 5000,
            ]
            await post(http, "/v1/finish", {"session_ids": names})
            async with http.get("/healthz") as response:
                left = (await response.json())["sessions"]
        await runner.cleanup()
        return left

    assert asyncio.run(main()) == 0
    monkeypatch.undo()
