"""The real vLLM, in the environment that $JORCH_VLLM names: it computes our model, takes our weights, leaves nothing."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

from jorch.data.chat import render_prompt
from jorch.export import hf, pretrained, probe
from jorch.export.heads import widen
from jorch.export.source import Held
from jorch.model.transformer import Qwen3
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.sections import MiniatureConfig, RolloutConfig, SamplerConfig, VllmConfig
from jorch.serving import control
from jorch.serving.push import push
from jorch.serving.samplers import Weights, make_sampler
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.synth import miniature
from jorch.synth.sft import train_tokenizer
from jorch.types import CompletionRequest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
CONTEXT, MAX_TOKENS, STOP = 256, 16, 3
# Float32 against float32, through another implementation.
ATOL = 1e-4
TOKENIZER = train_tokenizer()


def make_start(tiny_config, random_params, tied, seed=0):
    """A random model whose heads vLLM takes as they are."""
    sizes = {"vocab_size": TOKENIZER.vocab_size, "hidden_size": 64, "head_dim": 32, "max_position_embeddings": 4096}
    model = Qwen3(tiny_config(**sizes, tie_word_embeddings=tied))
    return pretrained.Pretrained(model, random_params(model, seed), TOKENIZER)


def export(folder, start, params=None):
    params = start.params if params is None else params
    hf.save(folder, start.model.config, params, start.tokenizer, {})
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(request, tiny_config, random_params, tmp_path_factory):
    """(start, url, folder) of a running server."""
    start = make_start(tiny_config, random_params, request.param)
    folder = tmp_path_factory.mktemp("served")
    options = ServeOptions(export(folder / "start", start), max_context_tokens=CONTEXT, rl=True)
    with vllm_server(options, folder / "vllm.log") as url:
        yield start, url, folder


def vllm_sampler(url, start, folder):
    config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig(urls=(url,)))
    weights = Weights(start, folder / "weights", config)
    return VllmSampler(config, [url], STOP, weights.write, weights.push)


def jax_sampler(start):
    config = SamplerConfig(max_rows=32, max_context_tokens=CONTEXT, prefill_chunk_tokens=64)
    return JaxSampler(start.model, start.params, config, max_tokens=MAX_TOKENS, stop_id=STOP)


def play(sampler, temperature, num=16):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(4, 300, rng.integers(4, 100)).astype(np.int32) for _ in range(num)]

    async def run():
        async with sampler.connected():
            sampler.expect([str(i) for i in range(num)])
            asked = [CompletionRequest(str(i), p, MAX_TOKENS, temperature, i) for i, p in enumerate(prompts)]
            completions = await asyncio.gather(*map(sampler.complete, asked))
            for i in range(num):
                sampler.release(str(i))
            return completions

    return list(zip(prompts, asyncio.run(run()), strict=True))


def check(played, start, params, qwen3_logits, temperature=1.0):
    """Every log-probability against the float64 model of `params`."""
    for prompt, completion in played:
        ids = completion.token_ids
        logits = qwen3_logits(params, start.model.config, np.concatenate([prompt, ids]))[len(prompt) - 1 : -1]
        logits = logits / temperature
        top = logits.max(-1, keepdims=True)
        logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        np.testing.assert_allclose(completion.logprobs, logprobs[np.arange(len(ids)), ids], rtol=0, atol=ATOL)


def test_it_computes_our_model(served, qwen3_logits):
    start, url, folder = served
    theirs, ours = play(vllm_sampler(url, start, folder), 0.0), play(jax_sampler(start), 0.0)
    for (_, a), (_, b) in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        assert a.finish_reason == b.finish_reason
    for temperature in (1.0, 0.5):
        played = play(vllm_sampler(url, start, folder), temperature)
        check(played, start, start.params, qwen3_logits, temperature)
        assert len({tuple(c.token_ids.tolist()) for _, c in played}) == len(played)


def test_seeds_decide_the_tokens(served):
    start, url, folder = served
    first, second = (play(vllm_sampler(url, start, folder), 1.0) for _ in range(2))
    for (_, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)


def test_pushed_weights_are_sampled_from_at_once(served, qwen3_logits):
    """Sixteen requests are under way meanwhile; afterwards no key or value of the old weights is left."""
    start, url, folder = served
    sampler = vllm_sampler(url, start, folder)
    prompt = np.arange(4, 204, dtype=np.int32)  # long enough for the prefix cache
    for version in (1, 2):
        changed = jax.tree.map(lambda x, v=version: x * (1 + 0.1 * v), start.params)

        async def run(changed=changed, version=version):
            async with sampler.connected():
                asked = [CompletionRequest(str(i), prompt, 40, 1.0, i) for i in range(16)]
                under_way = [asyncio.create_task(sampler.complete(request)) for request in asked]
                await asyncio.sleep(0.2)
                await asyncio.to_thread(sampler.publish, changed, version)
                return await asyncio.gather(*under_way)

        assert len(asyncio.run(run())) == 16
        played = play(sampler, 1.0)
        check(played, start, changed, qwen3_logits)
        assert {v for _, c in played for v in c.policy_versions.tolist()} == {version}
    sampler.publish(start.params, 3)
    check(play(sampler, 1.0), start, start.params, qwen3_logits)


@pytest.mark.parametrize("damage", ["no folder", "cut short", "tensor missing", "other shape"])
def test_a_bad_push_leaves_the_old_version_serving(damage, served, tiny_config, random_params, qwen3_logits, tmp_path):
    start, url, folder = served
    other = make_start(tiny_config, random_params, start.model.config.tie_word_embeddings, seed=1)
    bad = export(tmp_path / "bad", other)
    path = bad / "model.safetensors"
    if damage == "no folder":
        shutil.move(path, tmp_path / "elsewhere")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        last = tensors.pop("model.norm.weight")
        save_file(tensors | ({} if damage == "tensor missing" else {"model.norm.weight": last[:-1].copy()}), path)
    problems = push([url], bad, "bad", "float32")
    assert set(problems) == {url}
    assert "refused the weights in" in problems[url]
    check(play(vllm_sampler(url, start, folder), 1.0), start, start.params, qwen3_logits)


def test_a_probe_of_another_model_is_noticed(served, tiny_config, random_params):
    start, url, _ = served
    other = make_start(tiny_config, random_params, start.model.config.tie_word_embeddings, seed=2)
    expected = probe.make_probe(other.model.config, Held(other.params))
    scored = control.score(url, expected, salt="other", tokens_only=True)
    with pytest.raises(ValueError, match="does not compute the exported model"):
        probe.check(expected, scored, "float32", f"vLLM at {url}")


def test_a_client_that_goes_away_frees_its_slot(served):
    start, url, folder = served
    sampler = vllm_sampler(url, start, folder)

    def running():
        with urllib.request.urlopen(f"{url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    async def run():
        async with sampler.connected():
            endless = CompletionRequest("gone", np.array([5, 6], np.int32), CONTEXT - 2, 1.0, 1)
            sampler.stop_id = start.model.config.vocab_size - 1
            task = asyncio.create_task(sampler.complete(endless))
            await asyncio.sleep(0.3)
            task.cancel()

    asyncio.run(run())
    deadline_s = time.monotonic() + 10
    while running():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def members_of(word):
    """Living processes with `word` in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_jorch_serve_leaves_nothing(number, tiny_config, random_params, tmp_path):
    """Ready only when healthy; then ended, or killed."""
    start = make_start(tiny_config, random_params, True)
    folder = export(tmp_path / "model", start)
    before = set(os.listdir("/dev/shm"))
    script = "import sys; from jorch.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "serve", str(folder), "--rl", "--port", "0", "--dtype", "float32"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    lines = []
    while not (lines and lines[-1].startswith("ready: ")):
        line = child.stdout.readline()
        assert line, lines
        lines.append(line)
    assert members_of(str(folder))
    child.send_signal(number)
    child.wait(60)
    deadline_s = time.monotonic() + 60
    while members_of(str(folder)) or set(os.listdir("/dev/shm")) - before:
        assert time.monotonic() < deadline_s, (members_of(str(folder)), set(os.listdir("/dev/shm")) - before)
        time.sleep(0.2)
    child.communicate()


def test_a_server_that_is_killed_in_a_step_costs_nothing(tiny_config, random_params, served, qwen3_logits, tmp_path):
    """Of two servers one dies with requests under way: all are answered, by the weights that they asked for."""
    start, url, folder = served
    options = ServeOptions(export(tmp_path / "second", start), max_context_tokens=CONTEXT, rl=True)
    with vllm_server(options, tmp_path / "vllm.log") as second:
        config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig(urls=(url, second)))
        unlikely = start.model.config.vocab_size - 1
        weights = Weights(start, folder / "weights", config)
        sampler = VllmSampler(config, [url, second], unlikely, weights.write, weights.push)
        sampler.publish(start.params, 7)
        rng = np.random.default_rng(2)
        prompts = [rng.integers(4, 300, 20).astype(np.int32) for _ in range(24)]

        async def run():
            async with sampler.connected():
                asked = [CompletionRequest(str(i), p, 200, 1.0, i) for i, p in enumerate(prompts)]
                tasks = [asyncio.create_task(sampler.complete(request)) for request in asked]
                while not sampler._in_flight[second]:
                    await asyncio.sleep(0.001)
                # It stands still before it dies: none of its requests can be answered meanwhile.
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for pid in members_of(str(tmp_path / "second")):
                        if b"guard.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                            os.kill(pid, number)
                    await asyncio.sleep(0.2)
                    assert number == signal.SIGKILL or sampler._in_flight[second]
                return await asyncio.gather(*tasks)

        played = list(zip(prompts, asyncio.run(run()), strict=True))
    check(played, start, start.params, qwen3_logits)
    assert list(sampler._in_flight) == [url]


def test_the_openai_surface_parses_tool_calls(tmp_path, mesh):
    """Without --rl: a chat with tools, whose prompt has the very ids that the trainer would give it."""
    start = pretrained.load("base", mesh)
    hf.write(tmp_path / "model", *widen(start.model.config, Held(start.params)), start.tokenizer, {})
    [task] = miniature.tasks(MiniatureConfig(num_heldout=1), "heldout", 0)
    with vllm_server(ServeOptions(tmp_path / "model", max_context_tokens=CONTEXT), tmp_path / "vllm.log") as url:
        chat = {"model": control.MODEL, "messages": list(task.messages)}
        ids = control.post(url, "/tokenize", chat)["tokens"]
        assert ids == start.tokenizer.encode(render_prompt(task.messages, (), "compact")).tolist()
        asked = chat | {"tools": list(task.tools), "temperature": 0, "max_tokens": MAX_TOKENS}
        [choice] = control.post(url, "/v1/chat/completions", asked)["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] in {tool["function"]["name"] for tool in task.tools}
        with pytest.raises(ConnectionError, match="/collective_rpc"):
            control.post(url, "/collective_rpc", {"method": "jorch_reload", "kwargs": {"folder": "x"}})


def test_the_base_is_served_with_wider_heads(tmp_path, mesh):
    """The quickstart's heads are narrower than vLLM's CPU attention allows."""
    start = pretrained.load("base", mesh)
    assert widen(start.model.config, Held(start.params))[0].head_dim == 32
    rollout = RolloutConfig(max_tokens_per_turn=MAX_TOKENS)
    config = SamplerConfig(max_rows=32, max_context_tokens=CONTEXT, vllm=VllmConfig())
    sampler = make_sampler(config, rollout, start, tmp_path)
    try:
        theirs = play(sampler, 0.0)
    finally:
        sampler.close()
    for (_, a), (_, b) in zip(theirs, play(jax_sampler(start), 0.0), strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
    assert json.loads((tmp_path / "weights" / "base" / probe.FILE).read_text())["policy_version"] == 0
