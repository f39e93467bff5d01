"""The server over real HTTP on loopback, in this process."""

import asyncio
import contextlib
import json
import sys

import aiohttp
import pytest
from aiohttp import web

from tools_server import registry
from tools_server.app import make_app
from tools_server.config import ServerConfig
from tools_server.rescore import rescore
from tools_server.sessions import Sessions
from tools_server.wire import API_VERSION, MAX_ITEMS, Call, OpenSession, SessionRecord

PROFILE = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 2.0,
    "tokens_per_call": 1000,
    "latency_s": 1.0,
}
SETUP = {
    "model_mapping": {"search-1": "e", "reasoner-1": "e", "answer-1": "e"},
    "simulation": {"difficulty": 2, "needs": ["search"]},
}

TOY = """
import threading, time
from tools_server.environment import Observation

MEETING = threading.Barrier(2, timeout=20)

class Toy:
    blocking = True

    def __init__(self, setup, seed, config):
        if setup.get("broken"):
            raise KeyError("no such database")
        text = {"type": "object", "properties": {"text": {"type": "string", "enum": ["a", "b"]}}}
        text |= {"required": ["text"], "additionalProperties": False}
        self.tools = [
            {"type": "function", "function": {"name": "say", "parameters": text}},
            {"type": "function", "function": {"name": "add"}},
            {"type": "function", "function": {"name": "meet"}},
            {"type": "function", "function": {"name": "fail"}},
        ]
        self.messages = [{"role": "system", "content": "policy"}]
        self.numbers = []

    def call(self, name, arguments):
        if name == "fail":
            raise RuntimeError("secret detail")
        if name == "meet":
            MEETING.wait()
        if name == "add":
            time.sleep(0.002 * (len(self.numbers) % 3))
            self.numbers.append(arguments["number"])
        return Observation(name, "done", 0.5, 1.0, ended=name == "")

    def outcome(self):
        return float(self.numbers == sorted(self.numbers))
"""


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Registers the environment "toy", as lazily as the real ones."""
    pytest.importorskip("jsonschema", reason="needs jsonschema (extra tau2)")
    (tmp_path / "toy_environment_module.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.ENVIRONMENTS, "toy", "toy_environment_module:Toy")
    monkeypatch.setattr(registry, "_imported", {})
    monkeypatch.delitem(sys.modules, "toy_environment_module", raising=False)


class Server:
    def __init__(self, url, http):
        self.url, self.http = url, http

    async def request(self, method, path, payload=None, **options):
        data = payload if isinstance(payload, bytes) or payload is None else json.dumps(payload)
        async with self.http.request(method, self.url + path, data=data, **options) as response:
            return response.status, await response.json()

    async def post(self, path, payload):
        status, answer = await self.request("POST", path, payload)
        assert status == 200, answer
        return answer

    async def open(self, *ids, environment="experts", setup=SETUP, **fields):
        items = [{"session_id": i, "environment": environment, "setup": setup, **fields} for i in ids]
        return (await self.post("/v1/sessions", {"sessions": items}))["sessions"]

    async def call(self, *calls):
        """Calls are (session_id, call_id, name, arguments)."""
        keys = ("session_id", "call_id", "name", "arguments")
        items = [dict(zip(keys, call, strict=True)) for call in calls]
        return (await self.post("/v1/calls", {"calls": items}))["results"]

    async def finish(self, *ids):
        return (await self.post("/v1/finish", {"session_ids": list(ids)}))["records"]


@contextlib.asynccontextmanager
async def serving(**options):
    config = ServerConfig.model_validate({"experts": {"e": PROFILE}, **options})
    runner = web.AppRunner(make_app(config), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as http:
        yield Server(f"http://127.0.0.1:{runner.addresses[0][1]}", http)
    await runner.cleanup()


def run(scenario, **options):
    async def main():
        async with serving(**options) as server:
            return await scenario(server)

    return asyncio.run(main())


def test_a_batch_of_sessions_from_open_to_record():
    async def scenario(server):
        opened = await server.open("a", "b")
        assert len({session.pop("token") for session in opened}) == 2
        assert opened == [
            {"session_id": i, "tools": [], "messages": [], "error": None, "lease_s": 3600.0} for i in "ab"
        ]
        results = await server.call(
            ("a", "0", "search", {"model": "search-1"}),
            ("b", "0", "answer", {"model": "answer-1"}),
            ("a", "1", "answer", {"model": "answer-1"}),
        )
        assert [result["content"] for result in results] == ["documents", "answered", "answered"]
        assert [(result["session_id"], result["call_id"]) for result in results] == [
            ("a", "0"),
            ("b", "0"),
            ("a", "1"),
        ]
        assert await server.finish("a", "b") == [
            {
                "session_id": "a",
                "outcome": 1.0,
                "cost_usd": 0.004,
                "latency_s": 2.0,
                "tool_counts": {"search-1": 1, "answer-1": 1},
                "error": None,
                "verdict": None,
                "preference": {},
            },
            {
                "session_id": "b",
                "outcome": 0.0,
                "cost_usd": 0.002,
                "latency_s": 1.0,
                "tool_counts": {"answer-1": 1},
                "error": None,
                "verdict": None,
                "preference": {},
            },
        ]

    run(scenario)


def test_repeating_any_request_returns_the_first_answer_and_bills_once():
    async def scenario(server):
        assert await server.open("a") == await server.open("a")
        call = ("a", "0", "search", {"model": "search-1"})
        first = await server.call(call)
        assert await server.call(call, call) == first * 2
        assert first[0]["error"] is None
        record = await server.finish("a")
        assert record[0]["tool_counts"] == {"search-1": 1}
        assert await server.finish("a", "a") == record * 2

    run(scenario)


def test_one_id_for_two_things_is_refused():
    async def scenario(server):
        await server.open("a")
        for other in ({"seed": 1}, {"setup": SETUP | {"more": 1}}):
            [refused] = await server.open("a", **other)
            assert refused["error"] == "session 'a' is open with another environment, setup, seed or preference"
        await server.call(("a", "0", "search", {"model": "search-1"}))
        body = {"session_id": "a", "call_id": "0", "name": "answer", "arguments": {"model": "answer-1"}}
        status, answer = await server.request("POST", "/v1/calls", {"calls": [body]})
        assert (status, "call_id '0' was used before" in answer["error"]) == (409, True)
        await server.finish("a")
        [refused] = await server.open("a")
        assert refused["error"] == "session 'a' is finished; choose another session_id"

    run(scenario)


def test_unknown_and_ended_sessions_answer_in_place():
    async def scenario(server):
        await server.open("a", "b")
        answer = {"model": "answer-1"}
        results = await server.call(
            ("a", "0", "answer", answer), ("a", "1", "answer", answer), ("x", "0", "answer", answer)
        )
        assert [result["error"] for result in results] == [None, "session_over", "unknown_session"]
        assert all(result["ended"] for result in results)
        records = await server.finish("a", "x")
        assert [record["error"] for record in records] == [None, "unknown_session"]
        assert records[0]["tool_counts"] == {"answer-1": 1}
        [after] = await server.call(("a", "2", "answer", answer))
        assert after["error"] == "session_over"

    run(scenario)


def test_refused_set_ups_say_why_and_hold_no_place():
    async def scenario(server):
        [unknown] = await server.open("a", environment="chess")
        assert unknown["error"] == "unknown environment 'chess'; allowed: experts, tau2, toolscale, tools"
        [bad] = await server.open("a", setup={"model_mapping": {"answer-1": "absent"}})
        assert "unknown expert 'absent'" in bad["error"]
        assert (await server.request("GET", "/healthz"))[1]["sessions"] == 0
        assert (await server.open("a"))[0]["error"] is None

    run(scenario, max_sessions=1)


def test_the_cap_on_open_sessions_is_hard():
    async def scenario(server):
        sessions = [{"session_id": i, "environment": "experts", "setup": SETUP} for i in "abc"]
        for batch in (sessions, sessions):  # refused as a whole, so that it may be sent again
            async with server.http.post(server.url + "/v1/sessions", json={"sessions": batch}) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, "1")
                assert "max_sessions is 2" in (await response.json())["error"]
            assert (await server.request("GET", "/healthz"))[1]["sessions"] == 0
        await server.open("a", "b")
        await server.open("a", "b")  # no new ones
        fork = {"session_id": "a", "new_session_id": "f"}
        assert (await server.request("POST", "/v1/forks", {"forks": [fork]}))[0] == 429
        await server.finish("a")
        assert (await server.open("c"))[0]["error"] is None
        await server.finish("b", "c")
        # As many records as sessions are kept: the oldest is gone.
        assert [r["error"] for r in await server.finish("a", "b", "c")] == ["unknown_session", None, None]

    run(scenario, max_sessions=2)


def test_idle_sessions_are_forgotten():
    async def scenario(server):
        await server.open("a")
        async with asyncio.timeout(20):
            while (await server.request("GET", "/healthz"))[1]["sessions"]:
                await asyncio.sleep(0.02)
        assert (await server.finish("a"))[0]["error"] == "unknown_session"

    run(scenario, session_ttl_s=0.1)


def test_slept_latency_keeps_order_and_a_retry_joins_the_call_under_way():
    async def scenario():
        sessions = Sessions(ServerConfig.model_validate({"experts": {"e": PROFILE}, "time_scale": 0.05}))
        sessions.open(OpenSession("a", "experts", SETUP))
        search = sessions.call(Call("a", "0", "search", {"model": "search-1"}))
        answer = sessions.call(Call("a", "1", "answer", {"model": "answer-1"}))
        record = sessions.finish("a")
        assert sessions.call(Call("a", "0", "search", {"model": "search-1"})) is search
        assert sessions.finish("a") is record
        results = await asyncio.gather(search, answer, record)
        assert [result.error for result in results] == [None, None, None]
        assert results[2] == SessionRecord("a", 1.0, 0.004, 2.0, {"search-1": 1, "answer-1": 1})
        assert sessions.finish("a") == results[2]

    asyncio.run(scenario())


CALL = {"session_id": "a", "call_id": "0", "name": "search", "arguments": {}}


@pytest.mark.parametrize(
    ("path", "payload", "message"),
    [
        ("/v1/calls", b"{", "the body is not JSON: Expecting property name"),
        ("/v1/calls", b"\xff", "the body is not JSON"),
        ("/v1/calls", b"[" * 100_000, "the body is not JSON"),
        ("/v1/calls", [], 'expected {"calls": [...]} and nothing else'),
        ("/v1/calls", {"calls": [], "more": 1}, 'expected {"calls": [...]} and nothing else'),
        ("/v1/calls", {"calls": ["a"]}, "calls[0]: expected an object, got str"),
        (
            "/v1/calls",
            {"calls": [CALL, {"session_id": "a"}]},
            "calls[1]: expected the fields session_id, call_id, name, arguments; got session_id",
        ),
        ("/v1/calls", {"calls": [CALL | {"n": 1}]}, "got session_id, call_id, name, arguments, n"),
        ("/v1/calls", {"calls": [CALL | {"arguments": "x"}]}, "calls[0].arguments: expected an object"),
        ("/v1/calls", {"calls": [CALL] * (MAX_ITEMS + 1)}, f"calls: got {MAX_ITEMS + 1} items"),
        (
            "/v1/sessions",
            {"sessions": [{"session_id": "a", "environment": "experts", "setup": {}, "seed": "1"}]},
            "sessions[0].seed: expected an integer",
        ),
        ("/v1/finish", {"session_ids": [7]}, "session_ids[0]: expected a string, got int"),
    ],
)
def test_a_malformed_body_is_400_with_one_line(path, payload, message):
    async def scenario(server):
        return await server.request("POST", path, payload)

    status, answer = run(scenario)
    assert status == 400
    assert answer.keys() == {"error"}
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def test_other_http_errors_are_json_too():
    async def scenario(server):
        assert await server.request("GET", "/v2/calls") == (404, {"error": "Not Found: GET /v2/calls"})
        assert (await server.request("GET", "/v1/calls"))[0] == 405
        status, answer = await server.request("POST", "/v1/calls", {"calls": [CALL] * 20})
        assert status == 413
        assert "max_request_bytes" in answer["error"]

    run(scenario, max_request_bytes=1000)


def test_the_token_is_asked_for_and_stays_out_of_logs(monkeypatch, caplog):
    monkeypatch.setenv("JORCH_TOOLS_TOKEN", "swordfish")

    async def scenario(server):
        for headers in ({}, {"Authorization": "Bearer trout"}, {"Authorization": "Bearer trout\xe9"}):
            status, answer = await server.request("GET", "/v1/experts", headers=headers)
            assert status == 401
            assert answer["error"].startswith("wrong or missing bearer token (set JORCH_TOOLS_TOKEN)")
        status, answer = await server.request("GET", "/v1/experts", headers={"Authorization": "Bearer swordfish"})
        assert (status, answer) == (200, {"experts": {"e": PROFILE | {"reliability": 1.0}}})
        assert await server.request("GET", "/healthz") == (
            200,
            {"status": "ok", "version": API_VERSION, "sessions": 0, "lease_s": 3600.0},
        )

    with caplog.at_level("DEBUG"):
        run(scenario)
    assert "swordfish" not in caplog.text


def test_a_blocking_environment_sees_its_calls_in_order(toy):
    async def scenario(server):
        ids = ["a", "b", "c", "d"]
        opened = await server.open(*ids, environment="toy")
        assert opened[0]["messages"] == [{"role": "system", "content": "policy"}]
        assert [tool["function"]["name"] for tool in opened[0]["tools"]] == ["say", "add", "meet", "fail"]
        await server.call(*[(i, str(n), "add", {"number": n}) for n in range(25) for i in ids])
        return await server.finish(*ids)

    for record in run(scenario):
        assert (record["outcome"], record["cost_usd"], record["tool_counts"]) == (1.0, 12.5, {"add": 25})


def test_blocking_sessions_run_side_by_side(toy):
    async def scenario(server):
        await server.open("a", "b", environment="toy")
        return await server.call(("a", "0", "meet", {}), ("b", "0", "meet", {}))

    assert [result["error"] for result in run(scenario, worker_processes=1)] == [
        None,
        None,
    ]  # alone, each would wait for ever


def test_arguments_are_checked_against_the_schema(toy):
    async def scenario(server):
        await server.open("a", environment="toy")
        return await server.call(
            ("a", "0", "say", {"text": "c"}),
            ("a", "1", "say", {}),
            ("a", "2", "shout", {}),
            ("a", "3", "", {"content": 3}),
            ("a", "4", "say", {"text": "a"}),
            ("a", "5", "", {"content": "bye"}),
        ), await server.finish("a")

    results, [record] = run(scenario)
    assert [result["error"] for result in results] == [
        "invalid_arguments",
        "invalid_arguments",
        "unknown_tool",
        "invalid_arguments",
        None,
        None,
    ]
    assert results[0]["content"] == "$.text: 'c' is not one of ['a', 'b']"
    assert results[1]["content"] == "$: 'text' is a required property"
    assert results[2]["content"] == "unknown tool; allowed: say, add, meet, fail"
    assert results[5]["ended"]
    assert record["tool_counts"] == {"say": 1}


def test_an_environment_that_fails_ends_its_own_session_only(toy):
    async def scenario(server):
        [broken] = await server.open("x", environment="toy", setup={"broken": True})
        await server.open("a", "b", environment="toy")
        results = await server.call(
            ("a", "0", "fail", {}), ("a", "1", "say", {"text": "a"}), ("b", "0", "say", {"text": "a"})
        )
        return broken, results, await server.finish("a", "b")

    broken, results, records = run(scenario)
    assert broken["error"] == "env_error: KeyError: 'no such database'"
    assert [result["error"] for result in results] == ["env_error", "session_over", None]
    assert results[0]["content"] == "the environment failed: RuntimeError"
    assert [(record["outcome"], record["error"]) for record in records] == [(0.0, "env_error"), (1.0, None)]


def test_a_call_that_hangs_ends_its_own_session_without_a_verdict(toy, tmp_path):
    """Its process is killed; the other session, of the same process, goes on in another one."""

    async def scenario(server):
        await server.open("a", "b", environment="toy")
        await server.call(("b", "0", "add", {"number": 2}))
        results = await server.call(("a", "0", "meet", {}), ("a", "1", "say", {"text": "a"}))  # nobody comes to meet it
        other = await server.call(("b", "1", "add", {"number": 1}))
        [forked] = (await server.post("/v1/forks", {"forks": [{"session_id": "a", "new_session_id": "f"}]}))["sessions"]
        return results, other, forked, await server.finish("a", "b")

    traces = tmp_path / "traces.jsonl"
    options = {"environment_timeout_s": 1.5, "worker_processes": 1, "traces": str(traces)}
    results, [other], forked, records = run(scenario, **options)
    assert [result["error"] for result in results] == ["infra_error", "session_over"]
    assert results[0]["content"] == "the environment did not answer within 1.5 s"
    assert other["error"] is None
    assert forked["error"] == "its environment has failed"
    assert [(record["outcome"], record["error"]) for record in records] == [(0.0, "infra_error"), (0.0, None)]
    assert asyncio.run(rescore(traces, ServerConfig.model_validate({}))) == (2, [])


def test_an_environment_is_imported_at_its_first_session(toy):
    async def scenario(server):
        before = "toy_environment_module" in sys.modules
        await server.open("a", environment="toy")
        return before, "toy_environment_module" in sys.modules

    assert run(scenario) == (False, True)


def test_a_missing_package_refuses_the_session_with_its_name(monkeypatch):
    monkeypatch.setitem(registry.ENVIRONMENTS, "toy", "package_that_is_missing:Toy")

    async def scenario(server):
        return await server.open("a", environment="toy")

    [refused] = run(scenario)
    assert refused["error"] == (
        "environment 'toy' needs a package that is missing: No module named 'package_that_is_missing'"
    )
