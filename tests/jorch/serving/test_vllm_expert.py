"""The real vLLM as an expert and as a judge behind the tool server's chat tool; $JORCH_VLLM names its executable."""

import asyncio
import json
import os
import random
import subprocess
import sys
import urllib.request

import pytest
import yaml
from server_client import serving

from jorch.export import hf, pretrained
from jorch.export.heads import widen
from jorch.export.source import Held
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.synth import miniature

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
INPUT_USD, OUTPUT_USD = 2.0, 10.0
"""Per million tokens."""
QUESTION = "search-1 $0.2 2 s\nsearch-2 $9.0 5 s\nsearch cheaply"


@pytest.fixture(scope="module")
def model_server(mesh, tmp_path_factory):
    """The url of a server with quickstart's base model."""
    start = pretrained.load("base", mesh)
    folder = tmp_path_factory.mktemp("expert")
    hf.write(folder / "model", *widen(start.model.config, Held(start.params)), start.tokenizer, {})
    with vllm_server(ServeOptions(folder / "model", max_context_tokens=1024), folder / "vllm.log") as url:
        yield url


def expert(url, **options):
    prices = {"usd_per_million_input_tokens": INPUT_USD, "usd_per_million_output_tokens": OUTPUT_USD}
    limits = {"max_output_tokens": 12, "timeout_s": 120, "temperature": 0.0}
    return {"kind": "chat", "url": f"{url}/v1", "model": "policy", **prices, **limits, **options}


def post(url, path, payload):
    request = urllib.request.Request(
        url + path, json.dumps(payload).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def asked_directly(url):
    """vLLM's own answer, how many tokens its tokenizer counts in the prompt, and how many it drew."""
    messages = [{"role": "user", "content": QUESTION}]
    payload = {"model": "policy", "messages": messages, "temperature": 0.0, "max_tokens": 12, "seed": 3}
    choice = post(url, "/v1/chat/completions", payload | {"logprobs": True})
    num_output = len(choice["choices"][0]["logprobs"]["content"])
    num_input = post(url, "/tokenize", {"model": "policy", "messages": messages, "add_generation_prompt": True})[
        "count"
    ]
    return choice["choices"][0]["message"]["content"] or "", num_input, num_output


def test_an_experts_answer_and_its_bill(model_server):
    url = model_server
    text, num_input, num_output = asked_directly(url)

    async def main():
        async with serving({"expert": expert(url)}) as server:
            await server.open(verifier={"kind": "exact", "answers": [text], "normalize": False})
            result = await server.call("0", "expert", prompt=QUESTION)
            assert (result["content"], result["error"]) == (text, None)
            assert num_input > 10
            assert 0 < num_output <= 12
            bill = (num_input * INPUT_USD + num_output * OUTPUT_USD) / 1e6
            assert result["cost_usd"] == pytest.approx(bill, rel=1e-12)
            assert result["latency_s"] == result["work_s"] > 0
            many = await server.calls(*((str(i), "expert", {"prompt": QUESTION}) for i in range(1, 17)))
            assert {(r["content"], r["cost_usd"]) for r in many} == {(text, result["cost_usd"])}
            record = await server.finish()
            assert record["cost_usd"] == pytest.approx(17 * bill, rel=1e-12)

    asyncio.run(main())


def test_a_prompt_that_the_model_cannot_take_is_the_callers_fault(model_server):
    url = model_server

    async def main():
        async with serving({"expert": expert(url)}) as server:
            await server.open()
            result = await server.call("0", "expert", prompt="word " * 3000)
            assert result["error"] == "tool_error"
            assert result["content"].startswith("the model does not take this prompt: HTTP 400: ")
            assert result["cost_usd"] == 0.0

    asyncio.run(main())


def test_a_judge_that_no_verdict_comes_from_leaves_it_to_the_rule(model_server):
    """Quickstart's model knows no such question: the rule decides, and the verdict says so."""
    url = model_server

    async def main():
        async with serving({"judge": expert(url)}) as server:
            await server.open(question="2 + 2?", verifier={"kind": "judge", "tool": "judge", "answers": ["4"]})
            await server.call("0", "", content="4")
            record = await server.finish()
            assert (record["outcome"], record["verdict"]["verifier"]) == (1.0, "judge/1/rule")

    asyncio.run(main())


def test_check_asks_it(model_server, tmp_path):
    url = model_server
    (tmp_path / "server.yaml").write_text(yaml.safe_dump({"tools": {"expert": expert(url)}}))
    command = [sys.executable, "-m", "tools_server", str(tmp_path / "server.yaml"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "1/1 tools can be used\n")


def test_an_orchestrator_as_an_expert_calls_tools(model_server):
    """Quickstart's model does what it was trained for: it writes valid calls, which vLLM parses and the server carries out."""
    url = model_server
    role = {"type": "object", "properties": {"model": {"type": "string"}}, "required": ["model"]}
    tools = {
        name: {"kind": "constant", "answer": "documents", "parameters": role, "usd_per_call": 0.25, "latency_s": 1.0}
        for name in ("search", "enhance_reasoning", "answer")
    }
    task = miniature.make_task(random.Random(0), False, "train-0", "train")
    options = {"tools": list(tools), "max_turns": 1, "max_output_tokens": 64, "latency_s": None}

    async def main():
        async with serving(tools | {"orchestrator": expert(url, **options)}) as server:
            await server.open()
            return await server.call("0", "orchestrator", prompt=task.messages[-1]["content"])

    result = asyncio.run(main())
    assert (result["content"], result["error"]) == ("no answer after 1 turns", "tool_error")  # a call, no answer yet
    assert 0.25 < result["cost_usd"] < 0.26
    assert result["latency_s"] == pytest.approx(result["work_s"] + 1.0)
