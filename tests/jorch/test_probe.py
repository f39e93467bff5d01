"""The probe beside an export: what it says of a model is what the float64 model says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.export import heads, source, weights
from jorch.export.probe import NUM_TOKENS, make_probe, make_probe_fn
from jorch.export.source import Held
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.sections import LoraConfig
from jorch.synth.sft import train_tokenizer

# Float32 against float64 through two layers.
ATOL = 2e-4


def logprobs(params, config, token_ids, qwen3_logits):
    logits = qwen3_logits(params, config, token_ids)[:-1]
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return logits[np.arange(len(logits)), token_ids[1:]] - normaliser


@pytest.mark.parametrize("tied", [True, False])
def test_it_scores_random_tokens_as_the_model_does(tied, tiny_config, random_params, qwen3_logits, monkeypatch):
    """In several blocks of the vocabulary, and with heads widened for vLLM."""
    monkeypatch.setattr(source, "_BLOCK_ELEMENTS", 16 * 24)
    model = Qwen3(tiny_config(tie_word_embeddings=tied))
    params = random_params(model)
    assert len(list(Held(params).rows("embed"))) == 3
    plain = make_probe(model.config, Held(params))
    wide = make_probe(*heads.widen(model.config, Held(params)))
    expected = logprobs(params, model.config, np.array(plain.token_ids), qwen3_logits)
    assert len(plain.token_ids) == NUM_TOKENS == len(expected) + 1
    np.testing.assert_allclose(plain.logprobs, expected, rtol=0, atol=ATOL)
    # QK-norm's epsilon counts a little less among more dimensions.
    np.testing.assert_allclose(wide.logprobs, expected, rtol=0, atol=10 * ATOL)


def test_an_adapter_is_scored_with_its_base(tiny_config, random_params, mesh):
    """As the merged model's export would be, whatever the run computes in (on several devices: test_meshes.py)."""
    base, lora = Qwen3(tiny_config(compute_dtype="bfloat16")), LoraConfig(rank=2)
    model, frozen = LoraQwen3(base, lora), random_params(base)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model.abstract_params())
    found = make_probe_fn(base.config, lora, mesh)(params, frozen)
    expected = make_probe(base.config, Held(model.merge(params, frozen)))
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=ATOL)
    assert np.abs(np.subtract(found.logprobs, make_probe(base.config, Held(frozen)).logprobs)).max() > 0.1


def test_a_stored_checkpoint_is_the_same_source(tiny_config, random_params, mesh, tmp_path, monkeypatch):
    """Whatever the blocks of its embedding."""
    monkeypatch.setattr(source, "_BLOCK_ELEMENTS", 16 * 300)
    tokenizer = train_tokenizer()
    model = Qwen3(tiny_config(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False))
    params = random_params(model)
    weights.save(tmp_path / "ckpt", model.config, params, tokenizer)
    assert len(list((tmp_path / "ckpt" / "params").glob("embed_*"))) == 3
    stored = weights.Stored(tmp_path / "ckpt", model, mesh)
    assert make_probe(model.config, stored) == make_probe(model.config, Held(params))
    loaded = weights.load(tmp_path / "ckpt", model, mesh)
    np.testing.assert_array_equal(loaded["embed"], params["embed"])
    np.testing.assert_array_equal(loaded["layers"]["gate"], params["layers"]["gate"])
