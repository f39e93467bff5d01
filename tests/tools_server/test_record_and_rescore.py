"""Recordings, traces, and records that come out the same again, bit for bit."""

import asyncio
import json
import subprocess
import sys

import aiohttp
import pytest
from aiohttp import web
from fake_endpoint import completion, endpoint

from tools_server.app import SESSIONS, make_app
from tools_server.config import RecordingConfig, ServerConfig
from tools_server.recording import Recorder, recording_key
from tools_server.sessions import Sessions
from tools_server.tool import CallContext, ToolOutput, ToolSpec, Usage
from tools_server.trace import TraceFile
from tools_server.wire import OpenSession

SPEC = ToolSpec("t", "", {"type": "object"})
EXPERT = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 3.3,
    "tokens_per_call": 777,
    "latency_s": 0.1,
}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)


def recorder(path, mode):
    return Recorder(RecordingConfig(path=path, mode=mode))


class Counted:
    """Outputs that differ from call to call."""

    def __init__(self, error=None):
        self.num_calls, self.error = 0, error

    async def __call__(self):
        self.num_calls += 1
        await asyncio.sleep(0.01)
        return ToolOutput(f"output {self.num_calls}", self.error, Usage(10, 5, 2, 0.1), work_s=0.7, wait_s=0.2)


def test_the_modes(tmp_path):
    async def main():
        work, arguments, context = Counted(), {"b": 1, "a": [2]}, CallContext("s", seed=1)
        path = tmp_path / "calls.sqlite"
        outputs = []
        for mode in ("replay_or_fail", "replay", "replay", "record", "replay", "replay_or_fail"):
            file = recorder(path, mode)
            outputs.append(await file.call(SPEC, arguments, context, work))
            file.close()
        return outputs, work.num_calls

    outputs, num_calls = asyncio.run(main())
    assert [output.content for output in outputs] == [
        "no recording of this call of t",
        *["output 1"] * 2,
        *["output 2"] * 3,
    ]
    assert outputs[0].error == "infra_error"
    assert num_calls == 2
    assert outputs[2] == outputs[1]  # price and time are those of the first
    assert (outputs[5].usage, outputs[5].work_s, outputs[5].wait_s) == (Usage(10, 5, 2, 0.1), 0.7, 0.2)


def test_what_a_key_is_made_of():
    same = recording_key(SPEC, {"a": 1, "b": 2}, 0)
    assert same == recording_key(SPEC, {"b": 2, "a": 1}, 0)
    others = {
        recording_key(SPEC, {"a": 1, "b": 3}, 0),
        recording_key(SPEC, {"a": 1, "b": 2}, 1),
        recording_key(SPEC, {"a": 1, "b": 2}, 0, state="x"),
        recording_key(ToolSpec("t", "", {}, version="2"), {"a": 1, "b": 2}, 0),
        recording_key(ToolSpec("u", "", {}), {"a": 1, "b": 2}, 0),
        recording_key(SPEC, {"a": 1, "b": "\ud800"}, 0),
    }
    assert len(others - {same}) == 6


def test_another_clock_is_another_call(tmp_path):
    async def main():
        file, work = recorder(tmp_path / "calls.sqlite", "replay"), Counted()
        for clock_s in (None, 0.0, 1.0, 0.0, None):
            await file.call(SPEC, {}, CallContext("s", seed=1, clock_s=clock_s), work)
        file.close()
        return work.num_calls

    assert asyncio.run(main()) == 3


def test_equal_calls_at_once_are_carried_out_once_and_survive_a_cancelled_one(tmp_path):
    async def main():
        file, work = recorder(tmp_path / "x", "replay"), Counted()
        calls = [asyncio.create_task(file.call(SPEC, {}, CallContext(str(i), 0), work)) for i in range(5)]
        await asyncio.sleep(0.005)
        calls[0].cancel()
        outputs = await asyncio.gather(*calls, return_exceptions=True)
        return outputs, work.num_calls

    outputs, num_calls = asyncio.run(main())
    assert isinstance(outputs[0], asyncio.CancelledError)
    assert [output.content for output in outputs[1:]] == ["output 1"] * 4
    assert num_calls == 1


def test_failures_and_writes_are_not_recorded(tmp_path):
    async def main():
        file = recorder(tmp_path / "x", "replay")
        failing, working = Counted("infra_error"), Counted()
        writing = ToolSpec("w", "", {}, side_effect="write")
        for _ in range(2):
            await file.call(SPEC, {}, CallContext("s", 0), failing)
            await file.call(writing, {}, CallContext("s", 0), working)
        return failing.num_calls, working.num_calls

    assert asyncio.run(main()) == (2, 2)


def test_a_full_disk_costs_the_recording_not_the_call(tmp_path):
    async def main():
        file = recorder(tmp_path / "x", "record")
        file._file.execute("PRAGMA max_page_count = 3")  # as many as the table has
        output = await file.call(SPEC, {"long": "x" * 100_000}, CallContext("s", 0), Counted())
        failed = file.failed
        file._file.execute("PRAGMA max_page_count = 100000")
        await file.call(SPEC, {}, CallContext("s", 0), Counted())
        return output, failed, file.failed

    output, failed, failed_later = asyncio.run(main())
    assert (output.content, failed, failed_later) == ("output 1", True, False)


def test_a_full_disk_is_seen_by_the_load_balancer():
    """Writing to /dev/full fails as a full disk does."""
    config = ServerConfig.model_validate({"experts": {"e": EXPERT}, "traces": "/dev/full"})

    async def scenario(post, get):
        assert (await get("/readyz"))[0] == 200
        await play(post, "a")
        return await get("/readyz"), await get("/healthz")

    ready, health = asyncio.run(serve(config, scenario))
    assert ready == (503, {"status": "traces cannot be written"})
    assert health[0] == 200


def test_folders_of_files_are_made(tmp_path):
    traces, recordings = tmp_path / "traces" / "of" / "x", tmp_path / "recordings" / "x"
    TraceFile(traces)
    recorder(recordings, "record").close()
    assert traces.is_file()
    assert recordings.is_file()
    with pytest.raises(ValueError, match="cannot be written"):
        TraceFile(traces / "x")
    with pytest.raises(ValueError, match="cannot be used"):
        recorder(traces / "x", "record")


async def serve(config, scenario):
    runner = web.AppRunner(make_app(config), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as http:

        async def post(path, payload):
            async with http.post(url + path, json=payload) as response:
                answer = await response.json()
                assert response.status == 200, answer
                return answer

        async def get(path):
            async with http.get(url + path) as response:
                text = await response.text()
                return response.status, json.loads(text) if text.startswith("{") else text

        try:
            return await scenario(post, get)
        finally:
            await runner.cleanup()


async def play(post, session_id):
    """A session of simulated experts."""
    setup = {"model_mapping": {"search-1": "e", "answer-1": "e"}, "simulation": {"difficulty": 2, "needs": ["search"]}}
    session = {"session_id": session_id, "environment": "experts", "setup": setup, "seed": 5}
    await post("/v1/sessions", {"sessions": [session]})
    for call_id, name, arguments in (
        ("0", "search", {"model": "search-1"}),
        ("1", "searh", {}),
        ("2", "answer", {"model": "answer-1"}),
    ):
        call = {"session_id": session_id, "call_id": call_id, "name": name, "arguments": arguments}
        await post("/v1/calls", {"calls": [call]})
    return (await post("/v1/finish", {"session_ids": [session_id]}))["records"][0]


@pytest.fixture
def traces(tmp_path):
    """Traces of both kinds of session, their config file, and the metrics at their end."""
    path = tmp_path / "traces.jsonl"
    prices = {"usd_per_million_input_tokens": 1.7, "usd_per_million_output_tokens": 9.1}

    async def main():
        async with endpoint(completion("Lima", 333, 77)) as (_, url):
            chat = {"kind": "chat", "url": f"{url}/v1", "model": "m", **prices}
            config = ServerConfig.model_validate(
                {"experts": {"e": EXPERT}, "tools": {"chat": chat}, "traces": str(path)}
            )

            async def scenario(post, get):
                await play(post, "a")
                verifiers = [
                    {"kind": "exact", "answers": ["Lima"]},
                    {"kind": "numeric", "answer": 3},
                    {"kind": "judge", "answers": ["Lima"], "tool": "chat"},
                    None,
                ]
                for i, verifier in enumerate(verifiers):
                    session = {"session_id": f"t{i}", "environment": "tools", "setup": {"verifier": verifier}}
                    await post("/v1/sessions", {"sessions": [session]})
                    calls = [
                        {"session_id": f"t{i}", "call_id": str(n), "name": "chat", "arguments": {"prompt": f"p{n}"}}
                        for n in range(4)
                    ]
                    calls.append(
                        {"session_id": f"t{i}", "call_id": "end", "name": "", "arguments": {"content": "Lima"}}
                    )
                    await post("/v1/calls", {"calls": calls})
                    for _ in range(2):  # a repeated finish is one trace
                        await post("/v1/finish", {"session_ids": [f"t{i}"]})
                return await get("/metrics")

            return await serve(config, scenario)

    _, metrics = asyncio.run(main())
    (tmp_path / "server.yaml").write_text(json.dumps({"experts": {"e": EXPERT}}))
    return path, tmp_path / "server.yaml", metrics


def rescore(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools_server", "rescore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_record_comes_out_the_same(traces):
    path, config, _ = traces
    result = rescore(path, "--config", config)
    assert (result.returncode, result.stdout) == (0, "5/5 records are the same\n"), result.stderr


def test_a_changed_record_is_found(traces):
    path, config, _ = traces
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["record"]["cost_usd"] *= 1 + 2**-52
    lines[1]["record"]["outcome"] = 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = rescore(path, "--config", config)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "3/5 records are the same"
    assert "a: cost_usd was" in result.stdout
    assert "t0: outcome was 0.0, is 1.0" in result.stdout


def test_a_changed_answer_does_not_keep_the_judges_verdict(traces):
    path, config, _ = traces
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["calls"][-1]["call"]["arguments"]["content"] = "Quito"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = rescore(path, "--config", config)
    assert result.returncode == 1
    assert "t2: outcome was 1.0, is 0.0" in result.stdout
    assert result.stderr == ""


def test_mistakes_are_one_line(traces, tmp_path):
    path, config, _ = traces
    (tmp_path / "bad").write_text('{"version": 1}\n')
    for arguments, line in (
        ((tmp_path / "none",), f"{tmp_path}/none cannot be read"),
        ((tmp_path / "bad",), f"{tmp_path}/bad:1: no trace (KeyError: 'calls')"),
        ((path,), f"{path}:1: the session cannot be opened: setup.model_mapping.search-1: unknown expert 'e'"),
    ):
        result = rescore(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(line)
        assert result.stderr.count("\n") == 1


def test_what_prometheus_reads(traces):
    metrics = traces[2]
    for line in (
        'tools_calls_total{environment="experts",kind="ok"} 2.0',
        'tools_calls_total{environment="experts",kind="invalid_call"} 1.0',
        'tools_calls_total{environment="tools",kind="ok"} 20.0',
        'tools_sessions_finished_total{environment="tools",error="none"} 4.0',
        "tools_sessions_open 0.0",
        'tools_work_seconds_count{tool="chat"} 16.0',
    ):
        assert line in metrics
    assert "tools_event_loop_lag_seconds_bucket" in metrics


def test_an_environments_record_has_the_sessions_preference():
    async def main():
        sessions = Sessions(ServerConfig.model_validate({"experts": {"e": EXPERT}}))
        setup = {"model_mapping": {"answer-1": "e"}, "simulation": {"difficulty": 1}}
        sessions.open(OpenSession("a", "experts", setup, preference={"cost": 0.5}))
        record = sessions.finish("a")
        await sessions.close()
        return record

    assert asyncio.run(main()).preference == {"cost": 0.5}


def test_a_stopping_server_takes_no_session_and_lets_the_open_ones_end():
    config = ServerConfig.model_validate({"experts": {"e": EXPERT}})

    async def main():
        app = make_app(config)
        sessions = app[SESSIONS]
        from tools_server.__main__ import _drain

        setup = {"model_mapping": {"answer-1": "e"}}
        sessions.open(OpenSession("a", "experts", setup))
        draining = asyncio.create_task(_drain(sessions, 20.0))
        await asyncio.sleep(0.1)
        refused = sessions.open(OpenSession("b", "experts", setup))
        assert not draining.done()
        assert sessions.unready() == "the server is stopping"
        sessions.finish("a")
        await asyncio.wait_for(draining, 5)
        await sessions.close()
        return refused.error

    assert asyncio.run(main()) == "the server is stopping; open the session on another one"
