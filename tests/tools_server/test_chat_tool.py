"""Experts behind an OpenAI-compatible endpoint: over real HTTP, with every failure that such endpoints show."""

import asyncio
import time

import pytest
from fake_endpoint import completion, endpoint, half_json

from tools_server.config import ChatConfig
from tools_server.endpoint import Breaker
from tools_server.tool import CallContext, Price
from tools_server.tools.chat import MAX_DEPTH, ChatTool, shorten

PRICE = Price(call_usd=0.5, input_usd=2e-6, output_usd=1e-5, cached_usd=5e-7)
QUICK = {"timeout_s": 5.0, "backoff_s": 0.01, "retries": 2, "model": "m"}
QUICK |= {"usd_per_million_input_tokens": 2, "usd_per_million_output_tokens": 10}


def ask(*script, prompts=("hello",), depth=0, **options):
    """The outputs to `prompts`, asked at once, and the endpoint."""

    async def main():
        async with endpoint(*script) as (fake, url):
            config = ChatConfig.model_validate({"kind": "chat", "url": f"{url}/v1", **QUICK, **options})
            [tool] = await ChatTool("expert", config, PRICE).start()
            try:
                calls = [tool.call({"prompt": prompt}, CallContext("s", 7, depth)) for prompt in prompts]
                return await asyncio.gather(*calls), fake
            finally:
                await tool.close()

    return asyncio.run(main())


def test_usage_becomes_money():
    [output], fake = ask(completion("42", 1000, 50, cached_tokens=400), system="Be brief.", temperature=0.2)
    assert (output.content, output.error) == ("42", None)
    # 0.5 + 600 * 2e-6 + 400 * 5e-7 + 50 * 1e-5
    assert PRICE.cost_usd(output.usage) == pytest.approx(0.5 + 0.0012 + 0.0002 + 0.0005, rel=1e-12)
    assert fake.requests == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
            "max_tokens": 4096,
            "seed": 7,
            "temperature": 0.2,
        }
    ]
    assert fake.headers[0]["X-Jorch-Depth"] == "1"


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, b"oops"),
        (429, {"Retry-After": "0"}, b"slow down"),
        (503, {}, b""),
        half_json(),
        (200, {}, b"[]"),
        (200, {}, b"x" * 200_000),
    ],
    ids=["500", "429", "503", "half a JSON", "a list", "too long"],
)
def test_a_failure_that_passes_is_retried_and_costs_no_working_time(failure):
    [output], fake = ask(failure, failure, completion("fine"), max_answer_bytes=100_000)
    assert (output.content, output.error) == ("fine", None)
    assert len(fake.requests) == 3
    assert 0.01 <= output.work_s < output.work_s + output.wait_s
    assert output.wait_s > 0.01


@pytest.mark.parametrize(
    ("failure", "line", "requests"),
    [
        ((500, {}, b"oops"), "HTTP 500: oops", 3),
        ((401, {}, b"no such key"), "refused /chat/completions: HTTP 401: no such key", 1),
        ("hang", "nothing within 0.2 s", 3),
        ((200, {}, b"x" * 10_000_000), "more than 100000 bytes", 3),
        ({"choices": [{"message": {"content": "free?"}}]}, "no chat completion with usage", 1),
        ({"error": "x"}, "no chat completion with usage", 1),
        (completion("x", prompt_tokens=-5), "usage counts are at least 0", 1),
    ],
    ids=["500", "401", "hang", "10 MB", "no usage", "no choices", "negative usage"],
)
def test_what_does_not_pass_is_an_infrastructure_failure(failure, line, requests):
    [output], fake = ask(failure, timeout_s=0.2 if failure == "hang" else 5.0, max_answer_bytes=100_000)
    assert output.error == "infra_error"
    assert line in output.content
    assert len(fake.requests) == requests
    assert PRICE.cost_usd(output.usage) == PRICE.call_usd


def test_a_prompt_that_the_model_cannot_take_is_the_callers_fault():
    [output], fake = ask((400, {}, b"too many tokens"))
    assert (output.error, len(fake.requests)) == ("tool_error", 1)
    assert "too many tokens" in output.content


def test_no_endpoint_at_all():
    async def main():
        config = ChatConfig.model_validate({"kind": "chat", "url": "http://127.0.0.1:9/v1", **QUICK})
        [tool] = await ChatTool("expert", config, PRICE).start()
        output = await tool.call({"prompt": "x"}, CallContext("s", 0))
        await tool.close()
        return output

    output = asyncio.run(main())
    assert output.error == "infra_error"
    assert "does not answer" in output.content


def test_the_number_of_requests_at_once_is_limited():
    outputs, fake = ask(completion("x"), prompts=["p"] * 12, concurrency=3)
    assert [output.error for output in outputs] == [None] * 12
    assert fake.most_at_once == 3


def test_the_rate_is_limited():
    began_s = time.monotonic()
    ask(completion("x"), prompts=["p"] * 4, requests_per_minute=600)
    assert time.monotonic() - began_s >= 0.3  # the first at once, then 0.1 s apart


def test_the_breaker_leaves_a_dead_endpoint_alone():
    outputs, fake = ask((500, {}, b""), prompts=["p"] * 20, concurrency=1, breaker_failures=4)
    assert {output.error for output in outputs} == {"infra_error"}
    assert len(fake.requests) == 4
    assert "left alone" in outputs[-1].content


def test_the_breaker_tries_one_request_after_its_pause(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("tools_server.endpoint.time.monotonic", lambda: now_s)
    breaker = Breaker(failures=2, pause_s=5.0)
    assert breaker.admits()
    breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    now_s += 4.9
    assert not breaker.admits()
    now_s += 0.2
    assert [breaker.admits(), breaker.admits()] == [True, False]
    breaker.succeeded()
    assert breaker.admits()


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = ChatConfig.model_validate({"kind": "chat", "url": "http://h/v1", "key_variable": "NO_SUCH_KEY", **QUICK})
    with pytest.raises(
        ValueError, match=r"tools\.e: http://h/v1 needs a key: set the environment variable NO_SUCH_KEY"
    ):
        asyncio.run(ChatTool("e", config, PRICE).start())


def test_the_key_is_sent(monkeypatch):
    monkeypatch.setenv("A_KEY", "sesame")
    _, fake = ask(completion("x"), key_variable="A_KEY")
    assert fake.headers[0]["Authorization"] == "Bearer sesame"


def test_orchestrators_that_call_one_another_end():
    [output], fake = ask(completion("x"), depth=MAX_DEPTH)
    assert (output.error, fake.requests) == ("budget_exceeded", [])


def test_a_long_prompt_keeps_its_ends():
    assert shorten("short", 10) == "short"
    assert shorten("a" * 50 + "b" * 50, 25) == "a" * 10 + "\n...\n" + "b" * 10
