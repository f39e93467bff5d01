"""The client's side of vLLM's answers, faults above all, against a small server that gives them on demand."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from jorch.rollout import server_load, vllm_sampler
from jorch.rollout.vllm_sampler import SamplerDown, VllmSampler
from jorch.sections import SamplerConfig, VllmConfig
from jorch.types import CompletionRequest

STOP = 3
CONTEXT = 20


def choice(ids, reason="length", versions=None):
    content = [{"token_id": i, "logprob": -float(i)} for i in ids]
    spans = versions or [("default", 0, len(ids))]
    answer = {
        "index": 0,
        "finish_reason": reason,
        "token_ids": ids,
        "weight_versions": [{"version": name, "start": first, "end": end} for name, first, end in spans],
        "logprobs": {"content": content},
    }
    return web.json_response({"choices": [answer]})


def write(params, version):
    return Path(f"v{version}")


class Server:
    """Answers each request by the next of `script`, callables of the body; the last one again and again."""

    def __init__(self, *script, healthy=True):
        self.script, self.healthy, self.bodies, self.completion_bodies = list(script), healthy, [], []
        self.num_requests: tuple[int, int] | None = None
        self.completion = {"token_ids": [5, STOP], "logprobs": {"token_logprobs": [-0.5, -0.25]}}

    async def generate(self, request):
        self.bodies.append(await request.json())
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        result = answer(request)
        return await result if asyncio.iscoroutine(result) else result

    async def completions(self, request):
        self.completion_bodies.append(await request.json())
        return web.json_response({"choices": [{"index": 0, "text": "", "finish_reason": "stop", **self.completion}]})

    async def health(self, request):
        return web.Response(status=200 if self.healthy else 503)

    async def metrics(self, request):
        if self.num_requests is None:
            return web.Response(status=404)
        running, waiting = self.num_requests
        lines = (
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0",model_name="policy"}} {float(running)}',
            f'vllm:num_requests_waiting{{engine="0",model_name="policy"}} {float(waiting)}',
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0',
        )
        return web.Response(text="\n".join(lines) + "\n")


def fine(request):
    return choice([5, STOP], "stop")


def error(status):
    return lambda request: web.json_response({"error": {"message": "not now"}}, status=status)


def hang_up(request):
    request.transport.close()
    return web.Response()


@asynccontextmanager
async def serving(*servers):
    runners, urls = [], []
    for server in servers:
        app = web.Application()
        app.add_routes([web.post("/inference/v1/generate", server.generate), web.get("/health", server.health)])
        app.add_routes([web.post("/v1/completions", server.completions), web.get("/metrics", server.metrics)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        yield urls
    finally:
        for runner in runners:
            await runner.cleanup()


def sample(*servers, requests=1, max_tokens=4, timeout_s=20.0, prompt=(1, 2), temperature=0.7, policy_version=0):
    async def run():
        async with serving(*servers) as urls:
            config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig(request_timeout_s=timeout_s))
            push = lambda folder, version, urls: {}  # noqa: E731
            sampler = VllmSampler(config, urls, STOP, write, push, policy_version=policy_version)
            async with sampler.connected():
                asked = [
                    CompletionRequest(f"t{i}", np.array(prompt, np.int32), max_tokens, temperature, 11 + i)
                    for i in range(requests)
                ]
                return sampler, await asyncio.gather(*map(sampler.complete, asked))

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(vllm_sampler, "BACKOFF_S", 0.01)


def test_a_completion_is_what_was_drawn():
    server = Server(fine)
    sampler, [completion] = sample(server)
    assert completion.token_ids.tolist() == [5, STOP]
    assert completion.logprobs.tolist() == [-5.0, -3.0]
    assert (completion.finish_reason, completion.policy_versions.tolist()) == ("stop", [0, 0])
    assert sampler.stats.sampled_tokens == 2
    [body] = server.bodies
    assert (body["token_ids"], body["cache_salt"]) == ([1, 2], "v0")
    assert body["sampling_params"] == {
        "n": 1,
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "logprobs": 0,
        "seed": 11,
        "stop_token_ids": [STOP],
    }


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_without_the_token_endpoint_is_asked_for_completions(status):
    server = Server(error(status))
    _, completions = sample(server, requests=2, temperature=1.0, policy_version=6)
    for completion in completions:
        assert completion.token_ids.tolist() == [5, STOP]
        assert completion.logprobs.tolist() == [-0.5, -0.25]
        assert (completion.finish_reason, completion.policy_versions.tolist()) == ("stop", [6, 6])
    assert server.completion_bodies[0] == {
        "model": "policy",
        "prompt": [1, 2],
        "cache_salt": "v6",
        "n": 1,
        "max_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "logprobs": 0,
        "seed": server.completion_bodies[0]["seed"],
        "stop_token_ids": [STOP],
        "return_token_ids": True,
    }
    assert sorted(body["seed"] for body in server.completion_bodies) == [11, 12]


def test_completions_that_cannot_be_trained_on_are_refused():
    with pytest.raises(ValueError, match="has no token endpoint, and its completions need not have .* temperature 0.7"):
        sample(Server(error(404)))
    server = Server(error(404))
    del server.completion["token_ids"]
    with pytest.raises(ValueError, match="does not know return_token_ids"):
        sample(server, temperature=1.0)


def test_the_limit_is_cut_to_the_context_here():
    server = Server(lambda request: choice([7]))
    _, [completion] = sample(server, prompt=(1,) * (CONTEXT - 1))
    assert server.bodies[0]["sampling_params"]["max_tokens"] == 1
    assert completion.finish_reason == "length"


def test_an_aborted_answer_is_continued():
    server = Server(lambda request: choice([7, 8], "abort"), fine)
    _, [completion] = sample(server)
    assert completion.token_ids.tolist() == [7, 8, 5, STOP]
    assert completion.logprobs.tolist() == [-7.0, -8.0, -5.0, -3.0]
    assert server.bodies[1]["token_ids"] == [1, 2, 7, 8]
    assert server.bodies[1]["sampling_params"]["max_tokens"] == 2


def test_each_token_has_the_version_of_the_weights_that_drew_it():
    before_and_after_a_push = [("v3", 0, 2), ("v4", 2, 3)]
    server = Server(
        lambda request: choice([7, 8, 9], "abort", before_and_after_a_push),
        lambda r: choice([STOP], "stop", [("v5", 0, 1)]),
    )
    _, [completion] = sample(server)
    assert completion.token_ids.tolist() == [7, 8, 9, STOP]
    assert completion.policy_versions.tolist() == [3, 3, 4, 5]


@pytest.mark.parametrize("fault", [error(503), hang_up])
def test_a_busy_or_broken_connection_is_tried_again(fault):
    server = Server(fault, fault, fine)
    _, [completion] = sample(server)
    assert completion.token_ids.tolist() == [5, STOP]
    assert len(server.bodies) == 3


def test_a_dead_engine_leaves_the_rotation(capsys):
    dead, alive = Server(error(500), healthy=False), Server(fine)
    sampler, completions = sample(dead, alive, requests=6)
    assert [c.token_ids.tolist() for c in completions] == [[5, STOP]] * 6
    assert len(sampler._in_flight) == 1
    assert capsys.readouterr().out.count("is out of rotation: ") == 1


def test_our_own_mistake_is_not_tried_again():
    server = Server(error(400))
    with pytest.raises(ValueError, match=r"refused a request \(HTTP 400\): not now"):
        sample(server)
    assert len(server.bodies) == 1


def test_without_a_server_the_run_stops_with_addresses_and_reason():
    with pytest.raises(SamplerDown, match=r"no vLLM server answered t0 \(http://127.0.0.1:\d+\): .*HTTP 500, not now"):
        sample(Server(error(500)))


def test_a_server_that_never_answers_is_given_up_after_the_time_limit():
    async def sleep(request):
        await asyncio.sleep(2)

    with pytest.raises(SamplerDown, match="no answer within 0.3 s"):
        sample(Server(sleep), timeout_s=0.3)


def test_trajectories_are_spread_and_stay():
    async def slowly(request):
        await asyncio.sleep(0.05)
        return fine(request)

    servers = Server(slowly), Server(slowly)
    sample(*servers, requests=8)
    assert [len(server.bodies) for server in servers] == [4, 4]


def test_servers_that_refuse_weights_get_no_more_work():
    config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig())
    problems = {"http://a": "shape"}
    sampler = VllmSampler(config, ["http://a", "http://b"], STOP, write, lambda folder, version, urls: problems)
    sampler.publish(None, 4)
    assert (list(sampler._in_flight), sampler.policy_version) == (["http://b"], 4)
    problems["http://b"] = "gone"
    with pytest.raises(SamplerDown, match="no vLLM server took the weights of version 5: gone"):
        sampler.publish(None, 5)


@pytest.mark.parametrize(("reported", "shares"), [((6, 4), (0, 10)), (None, (5, 5)), ((0, 0), (5, 5))])
def test_what_others_ask_of_a_server_counts(reported, shares, monkeypatch):
    """Ten requests at once, on two servers of which the first says that it has ten of other clients."""
    monkeypatch.setattr(server_load, "PERIOD_S", 0.02)

    async def slowly(request):
        await asyncio.sleep(0.2)
        return fine(request)

    busy, idle = Server(slowly), Server(slowly)
    busy.num_requests, idle.num_requests = reported, (0, 0)

    async def run():
        async with serving(busy, idle) as urls:
            config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig())
            sampler = VllmSampler(config, urls, STOP, write, lambda folder, version, urls: {})
            async with sampler.connected():
                await asyncio.sleep(0.3)
                asked = [CompletionRequest(f"t{i}", np.array([1, 2], np.int32), 4, 1.0, i) for i in range(10)]
                await asyncio.gather(*map(sampler.complete, asked))

    asyncio.run(run())
    assert (len(busy.bodies), len(idle.bodies)) == shares
