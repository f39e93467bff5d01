"""What a server says on stderr: text on a terminal, JSON elsewhere, secrets nowhere."""

import asyncio
import json
import os
import pty
import subprocess
import sys
from datetime import datetime

import aiohttp
import pytest

SERVER = """
import sys
from tools_server import registry
from tools_server.__main__ import main
from tools_server.envs.experts import ExpertsEnvironment

class Broken(ExpertsEnvironment):
    def call(self, name, arguments):
        raise ArithmeticError("no such number")

registry.ENVIRONMENTS["experts"] = "__main__:Broken"
sys.exit(main())
"""
TOKEN = "a-secret-that-nobody-may-read"


@pytest.fixture
def config(tmp_path):
    expert = {"kind": "simulated", "skill": {"default": 1}}
    prices = {"usd_per_million_tokens": 1.0, "tokens_per_call": 1, "latency_s": 1.0}
    (tmp_path / "server.yaml").write_text(json.dumps({"experts": {"e": expert | prices}}))
    return tmp_path / "server.yaml"


def start(config, stderr, **environment):
    command = [sys.executable, "-c", SERVER, str(config), "--port", "0"]
    known = {name: value for name, value in os.environ.items() if name != "JORCH_TOOLS_TOKEN"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=known | environment)
    assert child.stdout is not None
    return child, child.stdout.readline().split()[-1]


async def fail(url):
    """One call whose environment has a bug."""
    setup = {"model_mapping": {"answer-1": "e"}, "simulation": {"difficulty": 1}}
    call = {"session_id": "s", "call_id": "0", "name": "answer", "arguments": {"model": "answer-1"}}
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as http:
        opening = {"sessions": [{"session_id": "s", "environment": "experts", "setup": setup}]}
        for path, payload in (("sessions", opening), ("calls", {"calls": [call]})):
            async with http.post(f"{url}/v1/{path}", json=payload) as response:
                assert response.status == 200


def test_json_for_collectors(config):
    child, url = start(config, subprocess.PIPE, JORCH_TOOLS_TOKEN=TOKEN)
    asyncio.run(fail(url))
    child.terminate()
    _, said = child.communicate(timeout=20)
    [line] = map(json.loads, said.splitlines())
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    frames = line.pop("exception")
    assert frames.startswith("Traceback")
    assert frames.endswith("ArithmeticError: no such number")
    assert line == {
        "level": "ERROR",
        "logger": "tools_server",
        "message": "an environment failed",
        "session": "s",
        "tool": "answer",
    }
    assert TOKEN not in said


def test_text_on_a_terminal(config):
    ours, theirs = pty.openpty()
    child, _ = start(config, theirs)
    os.close(theirs)
    child.terminate()
    child.communicate(timeout=20)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert " WARNING tools_server: no token is asked for, so whoever works on this machine may call: set " in said
