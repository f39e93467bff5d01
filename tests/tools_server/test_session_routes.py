"""One session at a time over real HTTP: its token, deadlines, leases, snapshots, and what becomes of work nobody wants."""

import asyncio
import contextlib
from urllib.parse import quote

import aiohttp
import pytest
import yarl
from aiohttp import web
from fake_endpoint import completion, endpoint

from tools_server.app import make_app
from tools_server.config import ServerConfig
from tools_server.rescore import rescore

EXPERT = {
    "kind": "simulated",
    "skill": {"default": 2},
    "usd_per_million_tokens": 1,
    "tokens_per_call": 1000,
    "latency_s": 0.1,
}
SETUP = {"model_mapping": {"search-1": "e", "answer-1": "e"}, "simulation": {"difficulty": 2, "needs": ["search"]}}
SEARCH = {"name": "search", "arguments": {"model": "search-1"}}
ANSWER = {"name": "answer", "arguments": {"model": "answer-1"}}
SAY = {"kind": "constant", "answer": "yes", "usd_per_call": 0.25, "latency_s": 1.0}
SERVER = {"Authorization": "Bearer sesame"}


def chat(url):
    prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
    return {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 0, "timeout_s": 20, **prices}


class Client:
    def __init__(self, http):
        self.http = http

    async def request(self, method, path, payload=None, headers=SERVER):
        async with self.http.request(method, path, json=payload, headers=headers) as response:
            return response.status, await response.json()

    async def open(self, name, environment="experts", setup=SETUP):
        session = {"session_id": name, "environment": environment, "setup": setup}
        status, answer = await self.request("POST", "/v1/sessions", {"sessions": [session]})
        assert (status, answer["sessions"][0]["error"]) == (200, None)
        return {"Authorization": f"Bearer {answer['sessions'][0]['token']}"}

    async def post(self, name, what, payload=None, headers=SERVER):
        path = yarl.URL(f"/v1/sessions/{quote(name, safe='')}/{what}", encoded=True)
        return await self.request("POST", path, payload, headers)

    async def ok(self, name, what, payload=None, headers=SERVER):
        status, answer = await self.post(name, what, payload, headers)
        assert status == 200, answer
        return answer


async def serving(scenario, **options):
    config = ServerConfig.model_validate({"experts": {"e": EXPERT}, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JORCH_TOOLS_TOKEN", "sesame")
        app = make_app(config)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as http:
            await scenario(Client(http))
    finally:
        await runner.cleanup()


def run(scenario, **options):
    asyncio.run(serving(scenario, **options))


def run_with_endpoint(scenario, *script, **options):
    """The scenario gets the scripted model behind the tool `expert`, too."""

    async def main():
        async with endpoint(*script) as (fake, url):
            await serving(lambda client: scenario(client, fake), tools={"expert": chat(url)}, **options)

    asyncio.run(main())


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_session_with_its_own_token():
    async def scenario(client):
        own = await client.open("run 1/a%b")
        name = "run 1/a%b"
        first = await client.ok(name, "call", {"call_id": "0", **SEARCH}, own)
        assert (first["session_id"], first["content"]) == (name, "documents")
        assert await client.ok(name, "call", {"call_id": "0", **SEARCH}, own) == first
        assert await client.ok(name, "heartbeat", None, own) == {"session_id": name, "num_calls": 1, "state": ""}
        assert (await client.ok(name, "snapshot", {}, own))["num_calls"] == 1
        batch = {"calls": [{"call_id": "0", **SEARCH}, {"call_id": "1", **ANSWER}]}
        results = (await client.ok(name, "call_batch", batch, own))["results"]
        assert results[0] == first
        assert results[1]["ended"]
        record = await client.ok(name, "finish", None, own)
        assert (record["outcome"], record["tool_counts"]) == (1.0, {"search-1": 1, "answer-1": 1})
        assert await client.ok(name, "finish", None, own) == record

    run(scenario)


def test_a_session_opened_by_its_path():
    async def scenario(client):
        wanted = {"environment": "experts", "setup": SETUP, "seed": 3}
        opened = [await client.request("PUT", "/v1/sessions/a", wanted) for _ in range(2)]
        assert opened[0] == opened[1]
        own = {"Authorization": f"Bearer {opened[0][1]['token']}"}
        assert (await client.ok("a", "call", {"call_id": "0", **SEARCH}, own))["error"] is None
        assert (await client.request("PUT", "/v1/sessions/b", wanted, own))[0] == 403
        assert (await client.request("PUT", "/v1/sessions/b", wanted | {"session_id": "c"}))[0] == 400

    run(scenario)


def test_tokens():
    """401: no token of this server's; 403: another session's, or one that may not do this."""

    async def scenario(client):
        own, other = await client.open("a"), await client.open("b")
        call = {"call_id": "0", **SEARCH}
        seen = {}
        genuine = own["Authorization"]
        forged = {
            "none": {},
            "wrong": {"Authorization": "Bearer trout"},
            "empty": {"Authorization": "Bearer ."},
            "half": {"Authorization": genuine[: len(genuine) // 2]},
            "long": {"Authorization": genuine + "0"},
            "of a": {"Authorization": other["Authorization"].split(".")[0] + "." + genuine.split(".")[1]},
        }
        for name, headers in forged.items():
            seen[name] = (await client.post("a", "call", call, headers))[0]
        assert set(seen.values()) == {401}, seen
        batch = {"calls": [{"session_id": "a", **call}]}
        mixed = {"calls": [{"session_id": "b", **call}, {"session_id": "a", **call}]}
        for path, payload in (
            ("/v1/calls", batch),
            ("/v1/calls", mixed),
            ("/v1/finish", {"session_ids": ["a"]}),
            ("/v1/heartbeats", {"session_ids": ["b", "a"]}),
            ("/v1/sessions", {"sessions": []}),
            ("/v1/forks", {"forks": []}),
            ("/v1/sessions/a/call", call),
            ("/v1/sessions/a/call_batch", {"calls": []}),
            ("/v1/sessions/a/heartbeat", {}),
            ("/v1/sessions/a/snapshot", {}),
            ("/v1/sessions/a/finish", {}),
            ("/v1/sessions/unknown/snapshot", {}),
            ("/v1/sessions/b/restore", {"num_calls": 0}),
            ("/v1/sessions/b/fork", {"new_session_id": "c"}),
            ("/mcp", {}),
        ):
            assert (await client.request("POST", path, payload, other))[0] == 403, path
        for method, path in (("DELETE", "/v1/sessions/b"), ("GET", "/metrics")):
            assert (await client.request(method, path, None, other))[0] == 403
        assert (await client.ok("a", "snapshot"))["num_calls"] == 0
        assert (await client.request("POST", "/v1/calls", batch, own))[0] == 200
        assert (await client.request("GET", "/v1/tools", None, own))[0] == 200

    pytest.importorskip("mcp", reason="needs the extra mcp")
    run(scenario, tools={"say": SAY})


def test_calls_are_taken_back_with_their_bill():
    async def scenario(client):
        await client.open("a")
        await client.ok("a", "call", {"call_id": "0", **SEARCH})
        await client.ok("a", "call", {"call_id": "1", **ANSWER})
        assert await client.ok("a", "restore", {"num_calls": 1}) == {"session_id": "a", "num_calls": 1, "state": ""}
        forked = await client.ok("a", "fork", {"new_session_id": "b", "num_calls": 0})
        assert forked["error"] is None
        again = await client.ok("a", "call", {"call_id": "1", "name": "search", "arguments": {"model": "search-1"}})
        assert again["error"] == "repeated_call"  # the first search still counts, and the id is free again
        await client.ok("a", "restore", {"num_calls": 1})
        await client.ok("a", "call", {"call_id": "1", **ANSWER})
        await client.ok("b", "call", {"call_id": "0", **ANSWER})
        records = [await client.ok(name, "finish") for name in "ab"]
        assert [(r["outcome"], r["cost_usd"]) for r in records] == [(1.0, 0.002), (0.0, 0.001)]
        refusals = [
            await client.post("a", "restore", {"num_calls": 0}),
            await client.post("b", "snapshot"),
            await client.post("b", "heartbeat"),
        ]
        assert [status for status, _ in refusals] == [404, 404, 404]
        await client.open("c")
        refusals = [await client.post("c", "restore", {"num_calls": n}) for n in (1, -2, True, "x")]
        assert [status for status, _ in refusals] == [409, 409, 400, 400]

    run(scenario)


def test_a_session_with_tools_takes_calls_back():
    async def scenario(client):
        await client.open("a", "tools", {"budget": {"calls": 2}})
        for call_id in "012":
            await client.ok("a", "call", {"call_id": call_id, "name": "say", "arguments": {}})
        await client.ok("a", "restore", {"num_calls": 1})
        results = [
            await client.ok("a", "call", {"call_id": c, "name": "say", "arguments": {}}) for c in ("0", "x", "y")
        ]
        assert [result["error"] for result in results] == [None, None, "budget_exceeded"]
        assert (await client.ok("a", "finish"))["tool_counts"] == {"say": 2}

    run(scenario, tools={"say": SAY})


def test_a_deadline_ends_the_work_and_charges_nothing():
    async def scenario(client, fake):
        await client.open("a", "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}, "deadline_s": 0.2}
        result = await client.ok("a", "call", call)
        assert (result["error"], result["cost_usd"], result["ended"]) == ("cancelled", 0.0, False)
        await until(lambda: fake.at_once == 0)
        assert await client.ok("a", "call", call | {"deadline_s": 5}) == result  # the first answer stands
        answered = await client.ok("a", "call", call | {"call_id": "1", "deadline_s": 5})
        assert (answered["error"], answered["content"]) == (None, "hello")
        for wrong in (-1, "1", True, [1]):
            assert (await client.post("a", "call", call | {"call_id": "2", "deadline_s": wrong}))[0] == 400
        record = await client.ok("a", "finish")
        assert (record["tool_counts"], record["error"]) == ({"expert": 1}, None)

    run_with_endpoint(scenario, "hang", completion("hello"))


def test_a_deadline_passes_in_the_queue_of_an_environment(tmp_path):
    """Latency that is slept: the second call would have to wait 0.2 s for its turn. The record comes out again."""

    async def scenario(client):
        await client.open("a")
        calls = [{"call_id": "0", **SEARCH}, {"call_id": "1", **ANSWER, "deadline_s": 0.05}]
        results = (await client.ok("a", "call_batch", {"calls": calls}))["results"]
        assert [result["error"] for result in results] == [None, "cancelled"]
        assert (await client.ok("a", "call", {"call_id": "2", **ANSWER}))["content"] == "answered"
        assert (await client.ok("a", "finish"))["outcome"] == 1.0

    options = {"time_scale": 2.0, "traces": str(tmp_path / "traces.jsonl")}
    run(scenario, **options)
    config = ServerConfig.model_validate({"experts": {"e": EXPERT}, **options})
    assert asyncio.run(rescore(tmp_path / "traces.jsonl", config)) == (1, [])


def test_a_client_that_goes_away_frees_its_work():
    async def scenario(client, fake):
        await client.open("a", "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
        waiting = asyncio.create_task(client.ok("a", "call", call))
        await until(lambda: fake.at_once == 1)
        waiting.cancel()
        await until(lambda: fake.at_once == 0)
        assert (await client.ok("a", "call", call))["error"] == "cancelled"
        assert (await client.ok("a", "call", call | {"call_id": "1"}))["content"] == "hello"

    run_with_endpoint(scenario, "hang", completion("hello"), abandon_s=0.1)


def test_a_client_that_comes_back_in_time_finds_its_work():
    async def scenario(client, fake):
        await client.open("a", "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
        waiting = asyncio.create_task(client.ok("a", "call", call))
        await until(lambda: fake.at_once == 1)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        again = asyncio.create_task(client.ok("a", "call", call))
        assert (await again)["content"] == "hello"
        assert len(fake.requests) == 1

    async def slow(request):
        await asyncio.sleep(1.0)
        return completion("hello")

    run_with_endpoint(scenario, slow, abandon_s=0.7)


@pytest.mark.parametrize("both_give_up", [False, True])
def test_recorded_work_ends_when_nobody_waits_for_it(tmp_path, both_give_up):
    """Two sessions make one call, carried out once; where both give up it is ended, where one stays it is recorded."""

    async def scenario(client, fake):
        deadlines = {"a": 0.2, "b": 0.2 if both_give_up else 20, "c": 20}
        for name in deadlines:
            await client.open(name, "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
        waiting = [
            asyncio.create_task(client.ok(name, "call", call | {"deadline_s": deadlines[name]})) for name in "ab"
        ]
        results = [await answer for answer in waiting]
        await until(lambda: fake.at_once == 0)
        expected = "cancelled" if both_give_up else None
        assert [result["error"] for result in results] == ["cancelled", expected]
        assert (await client.ok("c", "call", call))["content"] == "hello"
        assert len(fake.requests) == (2 if both_give_up else 1)

    async def slow(request):
        await asyncio.sleep(0.5)
        return completion("hello")

    recording = {"path": str(tmp_path / "calls.sqlite"), "mode": "replay"}
    run_with_endpoint(scenario, slow, recording=recording)


def test_deleting_a_session_ends_its_calls():
    async def scenario(client, fake):
        await client.open("a", "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
        waiting = asyncio.create_task(client.ok("a", "call", call))
        await until(lambda: fake.at_once == 1)
        assert (await client.post("a", "snapshot"))[0] == 409
        assert await client.request("DELETE", "/v1/sessions/a") == (200, {"deleted": True})
        assert (await waiting)["error"] == "cancelled"
        await until(lambda: fake.at_once == 0)
        assert await client.request("DELETE", "/v1/sessions/a") == (200, {"deleted": False})
        assert (await client.ok("a", "call", call))["error"] == "unknown_session"
        await client.open("a", "tools", {})  # the name is free again

    run_with_endpoint(scenario, "hang")


def test_the_cap_on_calls_is_hard():
    async def scenario(client, fake):
        await client.open("a", "tools", {})
        call = {"call_id": "0", "name": "expert", "arguments": {"prompt": "hi"}}
        waiting = asyncio.create_task(client.ok("a", "call", call))
        await until(lambda: fake.at_once == 1)
        more = {"calls": [call | {"call_id": "1"}]}
        status, answer = await client.post("a", "call_batch", more)
        assert (status, answer["error"]) == (429, "1 calls are under way, max_calls is 1")
        assert len(fake.requests) == 1
        async with client.http.get("/metrics", headers=SERVER) as response:
            text = await response.text()
        assert "tools_calls_under_way 1.0" in text
        assert 'tools_refused_total{cap="max_calls"} 1.0' in text
        assert (await waiting)["content"] == "late"
        assert (await client.ok("a", "call_batch", more))["results"][0]["content"] == "late"

    async def slow(request):
        await asyncio.sleep(0.3)
        return completion("late")

    run_with_endpoint(scenario, slow, max_calls=1)


@pytest.mark.slow
def test_a_heartbeat_keeps_a_session():
    async def scenario(client):
        await client.open("kept")
        await client.open("left")
        for _ in range(12):
            await asyncio.sleep(0.25)
            await client.ok("kept", "heartbeat")
        assert (await client.post("left", "heartbeat"))[0] == 404
        both = {"session_ids": ["left", "kept"]}
        assert await client.request("POST", "/v1/heartbeats", both) == (200, {"renewed": [False, True]})

    run(scenario, session_ttl_s=1.5)


@pytest.mark.parametrize(
    ("what", "payload", "message"),
    [
        ("call", {"call_id": "0"}, "call: expected the fields session_id, call_id, name, arguments"),
        ("call", [], "expected an object, got list"),
        ("call", {"call_id": "0", "session_id": "a", **SEARCH}, "expected the fields call_id, name, arguments"),
        ("call_batch", {"calls": [{"session_id": "a"}]}, "calls[0]: expected an object without session_id"),
        ("call_batch", {"calls": {}}, 'expected {"calls": [...]} and nothing else'),
        ("finish", {"now": True}, "expected the fields (none); got now"),
        ("fork", {"new_session_id": 3}, "fork.new_session_id: expected a string"),
        ("restore", {}, "num_calls: expected an integer"),
    ],
)
def test_malformed_requests(what, payload, message):
    async def scenario(client):
        await client.open("a")
        status, answer = await client.post("a", what, payload)
        assert status == 400
        assert message in answer["error"]
        assert "\n" not in answer["error"]

    run(scenario)
