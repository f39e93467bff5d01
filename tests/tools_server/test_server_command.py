"""`python -m tools_server` as a process: start, stop, and what it says when it cannot start."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import aiohttp
import pytest

CONFIG = """\
experts:
  e: {kind: simulated, skill: {default: 1}, usd_per_million_tokens: 1, tokens_per_call: 1000, latency_s: 2}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts servers, and ends those that a failing test leaves."""
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)
    children = []

    def start_server(*options, config=CONFIG, **popen):
        (tmp_path / "server.yaml").write_text(config)
        command = [sys.executable, "-m", "tools_server", "--config", str(tmp_path / "server.yaml"), *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(command, **pipes | popen))
        return children[-1]

    yield start_server
    for child in children:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()


def read_url(child):
    line = child.stdout.readline()
    assert line.startswith("tools-server ready http://127.0.0.1:"), line + child.stderr.read()
    return line.split()[-1]


def failure(child):
    """The only line on stderr of a child that a user's mistake ends."""
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    [line] = err.splitlines()
    return line


def test_sigterm_drains_and_exits_0(start):
    child = start("--port", "0", config=CONFIG + "time_scale: 1\n")
    url = read_url(child)

    async def metrics(http):
        async with http.get(f"{url}/metrics") as response:
            return await response.text()

    async def stop_during_a_call():
        async with aiohttp.ClientSession() as http:

            async def post(path, payload):
                async with http.post(url + path, data=json.dumps(payload)) as response:
                    return await response.json()

            setup = {"model_mapping": {"answer-1": "e"}, "simulation": {"difficulty": 1}}
            session = {"session_id": "a", "environment": "experts", "setup": setup}
            await post("/v1/sessions", {"sessions": [session]})
            call = {"session_id": "a", "call_id": "0", "name": "answer", "arguments": {"model": "answer-1"}}
            answer = asyncio.create_task(post("/v1/calls", {"calls": [call]}))
            while "tools_calls_under_way 1.0" not in await metrics(http):
                await asyncio.sleep(0.02)
            child.send_signal(signal.SIGTERM)
            return await answer

    assert asyncio.run(stop_during_a_call())["results"][0]["content"] == "answered"
    assert child.wait(timeout=30) == 0


def test_stops_when_stdin_closes(start):
    child = start("--port", "0", "--exit-with-parent", stdin=subprocess.PIPE)
    read_url(child)
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=30) == 0


def test_a_port_in_use(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert failure(start("--port", str(port))) == (
            f"port {port} is in use on 127.0.0.1; pass --port with another, or 0 for a free one"
        )


def test_mistakes_in_config_and_options(start, tmp_path):
    children = [
        start("--port", "0", "--exit-with-parent", stdin=subprocess.DEVNULL),
        start("--port", "0", "--host", "0.0.0.0"),
        start("--port", "0", "--host", "no.such.host.invalid", env=os.environ | {"JORCH_TOOLS_TOKEN": "t"}),
        start("--port", "0", "--config", str(tmp_path / "absent.yaml")),
    ]
    lines = [failure(child) for child in children]
    assert lines[0] == "--exit-with-parent needs a pipe from the parent as stdin"
    assert lines[1] == "host 0.0.0.0 is open to other machines: set JORCH_TOOLS_TOKEN, or use 127.0.0.1"
    assert lines[2].startswith("cannot listen on no.such.host.invalid: ")
    assert lines[3] == f"{tmp_path}/absent.yaml: cannot be read (No such file or directory)"
    line = failure(start(config="exports: {}\n"))
    assert line == f"{tmp_path}/server.yaml:1: unknown key 'exports'; did you mean 'experts'?"


def test_check_says_what_is_missing(start, tmp_path):
    config = f"""\
tools:
  search: {{kind: search, index: {tmp_path}/none.sqlite}}
  web: {{kind: web_search, url: "http://127.0.0.1:9/search", key_variable: NO_SUCH_KEY}}
  expert: {{kind: chat, url: "http://127.0.0.1:9/v1", model: m, retries: 0,
            usd_per_million_input_tokens: 1, usd_per_million_output_tokens: 1}}
  fine: {{kind: web_search, url: "http://127.0.0.1:9/search"}}
"""
    child = start("--check", config=config)
    out, _ = child.communicate(timeout=60)
    lines = out.splitlines()
    assert child.returncode == 1
    assert (
        lines[0]
        == f"tools.search: no search index at {tmp_path}/none.sqlite; `python -m tools_server index` writes one"
    )
    assert lines[1] == "tools.web: http://127.0.0.1:9/search needs a key: set the environment variable NO_SUCH_KEY"
    assert lines[2].startswith("tools.expert: http://127.0.0.1:9/v1 does not answer: ")
    assert lines[3:] == ["1/4 tools can be used"]


def test_a_mistake_in_a_tool_names_its_line(start, tmp_path):
    config = "tools:\n  py:\n    kind: python\n    memry_bytes: 5\n"
    assert failure(start(config=config)) == (
        f"{tmp_path}/server.yaml:4: unknown key 'tools.py.memry_bytes'; did you mean 'tools.py.memory_bytes'?"
    )
    line = failure(start(config="tools:\n  py:\n    kind: pyton\n"))
    assert line.startswith(f"{tmp_path}/server.yaml:2: 'tools.py': Input tag 'pyton' found")
