"""Wider heads compute the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.export.heads import WIDTH, widen
from jorch.export.source import Held, Merged, flat_adapter
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.sections import LoraConfig


def logits(config, params, tokens):
    module = Qwen3(config).bind(params)
    T = len(tokens)
    hidden = module.hidden(jnp.asarray(tokens)[None], jnp.arange(T)[None], jnp.full((1, T), T))
    return np.asarray(module.logits(hidden[0]))


def read_all(source):
    params = {name: jnp.concatenate(list(source.rows(name))) for name in source.shapes if name != "layers"}
    stacks = {
        name: jnp.stack([source.tensor(name, index) for index in range(shape.shape[0])])
        for name, shape in source.shapes["layers"].items()
    }
    return params | {"layers": stacks}


@pytest.mark.parametrize(("head_dim", "tied"), [(8, True), (16, False), (24, True)])
def test_padding_leaves_the_logits(head_dim, tied, tiny_config, random_params, qwen3_logits):
    config = tiny_config(head_dim=head_dim, tie_word_embeddings=tied)
    params = random_params(Qwen3(config))
    wide, source = widen(config, Held(params))
    padded = read_all(source)
    assert wide.head_dim == WIDTH
    assert jax.tree.map(lambda x: (x.shape, x.dtype), padded) == jax.tree.map(
        lambda x: (x.shape, x.dtype), Qwen3(wide).abstract_params()
    )
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 20)
    # Logits up to about 10, in float32.
    np.testing.assert_allclose(logits(wide, padded, tokens), qwen3_logits(params, config, tokens), rtol=0, atol=2e-4)


def test_an_adapter_is_padded_as_its_base(tiny_config, random_params):
    """Merged after padding is padded after merging."""
    base, lora = Qwen3(tiny_config(head_dim=8)), LoraConfig(rank=3)
    model, frozen = LoraQwen3(base, lora), random_params(base)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), model.abstract_params())
    wide, padded = widen(base.config, Held(model.merge(params, frozen)))
    _, padded_base = widen(base.config, Held(frozen))
    _, padded_adapter = widen(base.config, Held(flat_adapter(params)))
    merged = Merged(padded_base, padded_adapter, LoraQwen3(Qwen3(wide), lora))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), read_all(merged), read_all(padded))


def test_heads_that_fit_are_left_alone(tiny_config, random_params):
    config = tiny_config(head_dim=64)
    source = Held(random_params(Qwen3(config)))
    assert widen(config, source) == (config, source)
