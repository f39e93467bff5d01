"""Adapters pushed to a running vLLM that holds their base: visible at once, exact, or refused."""

import asyncio
import os
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jorch.export.adapter import WEIGHTS, Adapter
from jorch.export.probe import make_probe_fn
from jorch.model.lora import LoraQwen3
from jorch.sections import LoraConfig, MeshConfig, RolloutConfig, SamplerConfig, VllmConfig
from jorch.serving.push import push
from jorch.serving.samplers import Weights, make_sampler
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.sharding import make_mesh
from tests.jorch.serving.test_vllm import CONTEXT, MAX_TOKENS, check, export, make_start, play

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
LORA = LoraConfig(rank=4, alpha=8.0)
ROLLOUT = RolloutConfig(max_tokens_per_turn=MAX_TOKENS)


def drawn(start, seed):
    """A trained adapter as a learner publishes it, and the whole model that it makes."""
    model = LoraQwen3(start.model, LORA)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model.abstract_params())
    expected = make_probe_fn(start.model.config, LORA, make_mesh(MeshConfig()))(params, start.params)
    return Adapter(params, LORA, expected), model.merge(params, start.params)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def served(request, tiny_config, random_params, tmp_path_factory):
    """(start, sampler with a server of its own, folder)."""
    start, folder = make_start(tiny_config, random_params, request.param), tmp_path_factory.mktemp("adapters")
    config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig())
    with closing(make_sampler(config, ROLLOUT, start, folder, LORA)) as sampler:
        yield start, sampler, folder


def test_adapters_are_sampled_from_at_once(served, qwen3_logits):
    start, sampler, folder = served
    assert sampler.takes_adapters
    check(play(sampler, 1.0), start, start.params, qwen3_logits)
    for version in (1, 2):
        published, merged = drawn(start, version)

        async def push_in_the_middle(published=published, version=version):
            asked = asyncio.create_task(asyncio.to_thread(play, sampler, 1.0))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(sampler.publish, published, version)
            return await asked

        under_way = asyncio.run(push_in_the_middle())
        assert all(set(completion.policy_versions) <= {version - 1, version} for _, completion in under_way)
        played = play(sampler, 1.0)
        check(played, start, merged, qwen3_logits)
        assert all((completion.policy_versions == version).all() for _, completion in played)
    assert {path.name for path in (folder / "weights").iterdir()} == {"base", "v2"}


def without_one(tensors):
    tensors.popitem()


def with_another(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 64), np.float32)


def in_another_shape(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :-1]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (without_one, "1 tensor(s) missing, first"),
        (with_another, "1 tensor(s) too many, first 'base_model.model.lm_head.lora_A.weight'"),
        (in_another_shape, "has shape"),
        (None, "is cut short"),
    ],
)
def test_a_damaged_adapter_leaves_the_old_one_serving(damage, line, served, qwen3_logits):
    start, sampler, folder = served
    good, merged = drawn(start, 7)
    sampler.publish(good, 7)
    config = sampler.config
    bad = Weights(start.without_params(), folder / "bad", config).write(drawn(start, 8)[0], 8)
    if damage is None:
        whole = (bad / WEIGHTS).read_bytes()
        (bad / WEIGHTS).write_bytes(whole[:-1])
    else:
        tensors = load_file(bad / WEIGHTS)
        damage(tensors)
        save_file(tensors, bad / WEIGHTS)
    [problem] = push(list(sampler.urls), bad, "v8", "float32").values()
    assert "refused the weights" in problem
    assert line in problem
    check(play(sampler, 1.0), start, merged, qwen3_logits)
    shutil.rmtree(folder / "bad")


def test_an_adapter_of_a_higher_rank_is_refused(served):
    start, sampler, folder = served
    lora = LoraConfig(rank=9)
    idle = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), LoraQwen3(start.model, lora).abstract_params())
    high = Weights(start.without_params(), folder / "high", sampler.config).write(
        Adapter(idle, lora, drawn(start, 1)[0].probe), 9
    )
    [problem] = push(list(sampler.urls), high, "v9", "float32").values()
    assert "the adapter has rank 9, the server was started for 8 at most" in problem


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_running_servers_are_given_what_they_take(
    lora_rank, tiny_config, random_params, qwen3_logits, tmp_path, capsys
):
    """Adapters where they were started for them, merged weights otherwise; and another base is noticed."""
    start = make_start(tiny_config, random_params, tied=True)
    options = ServeOptions(export(tmp_path / "start", start), max_context_tokens=CONTEXT, rl=True, lora_rank=lora_rank)
    with vllm_server(options, tmp_path / "vllm.log") as url:
        config = SamplerConfig(max_context_tokens=CONTEXT, vllm=VllmConfig(urls=(url,)))
        sampler = make_sampler(config, ROLLOUT, start, tmp_path, LORA)
        assert sampler.takes_adapters == (lora_rank is not None)
        assert ("takes no adapters" in capsys.readouterr().out) == (lora_rank is None)
        published, merged = drawn(start, 3)
        sampler.publish(published if sampler.takes_adapters else merged, 1)
        check(play(sampler, 1.0), start, merged, qwen3_logits)
        if lora_rank is not None:
            other = make_start(tiny_config, random_params, tied=True, seed=5)
            with pytest.raises(ConnectionError, match="does not compute the exported model"):
                make_sampler(config, ROLLOUT, other, tmp_path / "other", LORA)
