"""The real vLLM loads an exported adapter beside its base and computes the merged model."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.export import adapter, hf
from jorch.export.source import Held, flat_adapter
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.sections import LoraConfig
from jorch.serving import control
from jorch.serving.vllm import EXECUTABLE_VARIABLE, ServeOptions, vllm_server
from jorch.synth.sft import train_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(EXECUTABLE_VARIABLE not in os.environ, reason=f"{EXECUTABLE_VARIABLE} names no vllm executable"),
]
# Float32 against float32, through another implementation.
ATOL = 1e-4


def test_vllm_serves_the_adapter(tiny_config, random_params, qwen3_logits, tmp_path):
    tokenizer = train_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 64, "head_dim": 32, "max_position_embeddings": 4096}
    base = Qwen3(tiny_config(**sizes))
    frozen, lora = random_params(base), LoraConfig(rank=8, alpha=8.0)
    model = LoraQwen3(base, lora)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model.abstract_params())
    hf.save(tmp_path / "base", base.config, frozen, tokenizer, {})
    adapter.save(tmp_path / "adapter", lora, Held(flat_adapter(params)), str(tmp_path / "base"))

    ids = rng.integers(4, 300, 60).tolist()
    further = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={tmp_path / 'adapter'}")
    options = ServeOptions(tmp_path / "base", max_context_tokens=256, further=further)
    with vllm_server(options, tmp_path / "vllm.log") as url:
        body = {"model": "tuned", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        entries = control.post(url, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    got = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], ids[1:], strict=True)]
    logprobs = {}
    for name, weights in (("base", frozen), ("merged", model.merge(params, frozen))):
        logits = qwen3_logits(weights, base.config, np.array(ids))[:-1]
        logits -= logits.max(-1, keepdims=True)
        logprobs[name] = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    assert np.abs(logprobs["base"] - logprobs["merged"]).max() > 0.5, "the adapter does nothing"
    np.testing.assert_allclose(got, logprobs["merged"], rtol=0, atol=ATOL)
