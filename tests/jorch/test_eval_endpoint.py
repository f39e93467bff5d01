"""A model behind an OpenAI-compatible endpoint as the orchestrator, through a real tool server: it scores as the same
policy does without a chat, and faults of the endpoint are never scored.
"""

import asyncio
import json
import random

import pytest
import yaml
from fake_endpoint import completion, endpoint

from jorch.config import EndpointConfig, EvalConfig
from jorch.evals import baselines, chat_endpoint
from jorch.evals.chat_endpoint import ChatEndpoint, EndpointDown
from jorch.evals.chat_policy import play_chat
from jorch.evals.metrics import summarise
from jorch.rollout.server_process import start_tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.sections import MiniatureConfig, OrchestratorPrice
from jorch.synth import miniature

TASKS = list(miniature.tasks(MiniatureConfig(num_train=24), "train", 0))
POLICY = "cheapest_capable"
CONFIG = EvalConfig(
    out="unused", tasks="unused", tools_server={"url": "http://unused"}, endpoint={"url": "http://unused"},
    sampler={"max_context_tokens": 128}, rollout={"max_turns": 5, "max_tokens_per_turn": 16, "max_prompt_tokens": 64},
)  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.yaml").write_text(yaml.safe_dump({"experts": miniature.catalogue()}))
    with start_tool_server(folder / "server.yaml", folder / "server.log") as address:
        yield address


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "BACKOFF_S", 0.01)


def calls(name, arguments):
    answer = completion(None)
    function = {"name": name, "arguments": arguments}
    answer["choices"][0]["message"]["tool_calls"] = [{"id": "c0", "type": "function", "function": function}]
    return answer


def chosen(policy, task, name, rng, choose=baselines.choose):
    """As the baseline, but ties are always broken alike."""
    return choose(policy, task, name, random.Random(0))


async def policy(body):
    """Asks, as a model would, for what POLICY asks for next."""
    (task,) = [task for task in TASKS if task.messages[0] == body["messages"][0]]
    assert body["tools"] == list(task.tools)
    number = sum(message["role"] == "tool" for message in body["messages"])
    name = (*task.truth["needs"], "answer")[number]
    return calls(name, json.dumps({"model": chosen(POLICY, task, name, None)}))


def play(url, *script, tasks=TASKS, retries=2, **changes):
    async def run():
        config = CONFIG.model_copy(update={"rollout": CONFIG.rollout.model_copy(update=changes)})
        async with endpoint(*script) as (fake, address), ToolClient(url, timeout_s=30, retries=0) as tools:
            section = EndpointConfig(url=f"{address}/v1", model="m")
            async with ChatEndpoint(section, timeout_s=5, retries=retries) as chat:
                return fake, await play_chat(tasks, tools, chat, config, 0.0)

    return asyncio.run(run())


def test_it_scores_as_the_same_policy_without_a_chat(url, monkeypatch):
    monkeypatch.setattr(baselines, "choose", chosen)

    async def baseline():
        async with ToolClient(url, timeout_s=30, retries=0) as tools:
            return await baselines.play(POLICY, TASKS, tools, 0, 16)

    fake, rows = play(url, policy)
    assert summarise(rows) == summarise(asyncio.run(baseline()))
    assert {row.termination for row in rows} == {"answered"}
    first = fake.requests[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.0, 16)
    last = max(fake.requests, key=lambda body: len(body["messages"]))
    assert [m["role"] for m in last["messages"][-2:]] == ["assistant", "tool"]
    assert last["messages"][-1]["tool_call_id"] == last["messages"][-2]["tool_calls"][0]["id"]


def test_its_own_tokens_are_billed(url):
    async def cached(body):
        answer = await policy(body)
        return answer | {"usage": completion(None, prompt_tokens=50, completion_tokens=10, cached_tokens=30)["usage"]}

    prices = ("usd_per_million_input_tokens", 100.0), ("usd_per_million_cached_tokens", 1.0)
    price = OrchestratorPrice.model_validate(dict(prices) | {"usd_per_million_output_tokens": 7000.0})
    (free,), (billed,) = (play(url, cached, tasks=TASKS[:1], orchestrator=of)[1] for of in (OrchestratorPrice(), price))
    num_completions = len(TASKS[0].truth["needs"]) + 1
    assert billed.cost_usd - free.cost_usd == pytest.approx(num_completions * (20 * 100 + 30 * 1 + 10 * 7000) / 1e6)


@pytest.mark.parametrize(
    ("answer", "termination"),
    [
        (calls("answer", "{"), "invalid"),
        (calls("answer", '"text"'), "invalid"),
        (calls("answer", '{"model": "nobody"}'), "invalid"),
        (completion("I would rather talk."), "invalid"),
    ],
)
def test_what_it_writes_wrongly_is_its_own_fault(url, answer, termination):
    _, [row] = play(url, answer, tasks=TASKS[:1], max_malformed_calls=2)
    assert (row.termination, row.accuracy, row.format_valid) == (termination, 0.0, 0.0)


@pytest.mark.parametrize("fault", [(503, {}, b"busy"), (429, {}, b"slow down"), (200, {}, b"{half")])
def test_a_fault_that_passes_costs_nothing(url, fault):
    _, [row] = play(url, fault, fault, policy, tasks=TASKS[:1])
    assert (row.termination, row.accuracy) == ("answered", 1.0)


def test_an_endpoint_that_stays_away_stops_the_run_by_its_address(url):
    with pytest.raises(
        EndpointDown, match=r"endpoint http://127.0.0.1:\d+/v1 does not answer \(3 attempts .*HTTP 503: no"
    ):
        play(url, (503, {}, b"no"))


def test_a_refused_key_is_told_at_once_and_never_shown(url, monkeypatch):
    monkeypatch.setenv("JORCH_ENDPOINT_KEY", "s3cret")
    with pytest.raises(
        ValueError, match=r"refused /chat/completions \(HTTP 401: who\?\); its key is read from"
    ) as caught:
        play(url, (401, {}, b"who?"))
    assert "s3cret" not in str(caught.value)
    fake, _ = play(url, policy, tasks=TASKS[:1])
    assert fake.headers[0]["Authorization"] == "Bearer s3cret"


def test_a_conversation_that_grows_too_long_is_data(url):
    task = next(task for task in TASKS if task.truth["needs"])
    long = (400, {}, b"context length exceeded")

    async def first(body):
        return await policy(body)

    _, [row] = play(url, first, long, tasks=[task])
    assert (row.termination, row.accuracy) == ("max_tokens", 0.0)
    with pytest.raises(ValueError, match="refused task .* at its first request"):
        play(url, long, tasks=[task])
