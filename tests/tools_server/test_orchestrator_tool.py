"""A chat tool that may call tools of the server: a scripted endpoint over HTTP that answers with tool calls."""

import asyncio
import json

import pytest
from fake_endpoint import completion, endpoint
from server_client import serving

from tools_server.tools.chat import MAX_DEPTH

LOOK = {
    "kind": "constant",
    "answer": "Santiago",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    "usd_per_call": 0.25,
    "latency_s": 2.0,
}


def expert(url, tools=("look",), **options):
    prices = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 10.0}
    base = {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 0, "tools": list(tools)}
    return {"expert": base | prices | options, "look": LOOK}


def calling(*calls):
    answer = completion(None, prompt_tokens=1000, completion_tokens=20)
    answer["choices"][0]["message"]["tool_calls"] = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return answer


def ask(*script, tools=expert, depth=0, **options):
    async def main():
        async with endpoint(*script) as (fake, url):
            async with serving(tools(url, **options)) as server:
                await server.open(depth=depth)
                return await server.call("0", "expert", prompt="Capital of Chile?"), fake

    return asyncio.run(main())


def test_it_calls_a_tool_and_both_are_billed():
    result, fake = ask(calling(("look", '{"query": "Chile"}')), completion("Santiago.", 2000, 5))
    assert (result["content"], result["error"]) == ("Santiago.", None)
    assert result["cost_usd"] == pytest.approx(3000 * 1e-6 + 25 * 1e-5 + 0.25, rel=1e-12)
    assert result["latency_s"] == pytest.approx(result["work_s"] + 2.0)
    first, second = fake.requests
    assert [tool["function"]["name"] for tool in first["tools"]] == ["look"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2] == {"role": "tool", "tool_call_id": "c0", "content": "Santiago"}


@pytest.mark.parametrize(
    ("name", "arguments", "content"),
    [
        ("look", "{}", "$: 'query' is a required property"),
        ("look", "[]", "$: expected an object"),
        ("look", "{", "error: no call (JSONDecodeError"),
        ("expert", '{"prompt": "x"}', "unknown tool; allowed: look"),
    ],
)
def test_its_mistakes_are_observations_and_cost_no_fee(name, arguments, content):
    result, fake = ask(calling((name, arguments)), completion("Lima", 0, 0))
    assert (result["content"], result["error"]) == ("Lima", None)
    assert result["cost_usd"] == pytest.approx(1000 * 1e-6 + 20 * 1e-5)
    assert fake.requests[1]["messages"][2]["content"].startswith(content)


def test_it_ends_after_its_turns():
    result, fake = ask(calling(("look", '{"query": "x"}')), max_turns=3)
    assert (result["content"], result["error"]) == ("no answer after 3 turns", "tool_error")
    assert len(fake.requests) == 3
    assert result["cost_usd"] == pytest.approx(3 * (1000 * 1e-6 + 20 * 1e-5 + 0.25))


def test_a_recursion_ends():
    """Its only tool is itself, which it calls until there is no depth left; then every one answers."""

    async def model(request):
        last = request["messages"][-1]
        return calling(("expert", '{"prompt": "deeper"}')) if last["role"] == "user" else completion(last["content"])

    result, fake = ask(model, tools=lambda url: expert(url, tools=("expert",)))
    assert result["error"] is None
    assert result["content"] == f"{MAX_DEPTH} orchestrators call one another already"
    assert sorted(headers["X-Jorch-Depth"] for headers in fake.headers) == sorted("1234" * 2)
    assert len(fake.requests) == 2 * MAX_DEPTH
    # The bill of the outermost holds those of all below: every request was answered once.
    bill = MAX_DEPTH * (1000 * 1e-6 + 20 * 1e-5 + 100 * 1e-6 + 10 * 1e-5)
    assert result["cost_usd"] == pytest.approx(bill, rel=1e-12)


def test_what_fails_below_is_an_infrastructure_failure():
    script = [calling(("other", '{"prompt": "x"}')), (500, {}, b"")]

    def tools(url):
        other = {key: value for key, value in expert(url)["expert"].items() if key != "tools"}
        return expert(url, tools=("other",)) | {"other": other}

    result, _ = ask(*script, tools=tools)
    assert (result["error"], result["ended"]) == ("infra_error", True)


def test_a_tool_that_is_not_there_stops_the_server():
    async def main():
        async with serving(expert("http://127.0.0.1:9", tools=("search",))):
            pass

    with pytest.raises(ValueError, match=r"tools\.expert\.tools: unknown tool 'search'; this server has expert, look"):
        asyncio.run(main())


def test_recordings_keep_the_whole_bill(tmp_path):
    recording = {"path": str(tmp_path / "recordings"), "mode": "replay"}
    script = [calling(("look", json.dumps({"query": "Chile"}))), completion("Santiago.", 2000, 5)]

    async def main():
        async with endpoint(*script) as (fake, url):
            async with serving(expert(url), recording=recording) as server:
                await server.open("a")
                await server.open("b")
                call = ("0", "expert", {"prompt": "Capital of Chile?"})
                (first,) = await server.calls(call, session_id="a")
                (second,) = await server.calls(call, session_id="b")
                return first, second, len(fake.requests)

    first, second, num_requests = asyncio.run(main())
    assert num_requests == 2
    assert {**first, "session_id": "b"} == second
    assert second["cost_usd"] > 0.25
