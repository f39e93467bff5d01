"""The model against Qwen3 written down once more in float64 (conftest.py), and packing against one row a sequence."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jorch.data.packing import pack
from jorch.model.transformer import Qwen3
from jorch.plan.job import PUBLISHED
from jorch.sections import ModelConfig
from jorch.sharding import MESH_AXES, sharding
from jorch.train.logprobs import token_logprobs
from jorch.types import PackedBatch, Sample
from kernels.attention.api import why

# Two layers of float32 sums of up to 64 terms of size about 1, each rounded to 6e-8 of itself.
ATOL = 2e-5


def sequence(seed, length, vocab_size=64):
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


def logits_of(model, params, token_ids):
    """Logits [n, V] of one sequence alone in a row."""
    n = len(token_ids)

    @jax.jit
    def run(params):
        module = model.bind(params)
        hidden = module.hidden(jnp.asarray(token_ids)[None], jnp.arange(n)[None], jnp.full((1, n), n))
        return module.logits(hidden)[0]

    return np.asarray(run(params))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {"num_key_value_heads": 1, "num_hidden_layers": 3, "rope_theta": 1e6},
    ],
    ids=["tied", "untied", "full-heads", "one-kv-head"],
)
def test_logits_equal_the_float64_model(changes, tiny_config, random_params, qwen3_logits):
    model = Qwen3(tiny_config(**changes))
    params = random_params(model)
    token_ids = sequence(0, 20)
    expected = qwen3_logits(params, model.config, token_ids)
    np.testing.assert_allclose(
        logits_of(model, params, token_ids), expected, rtol=0, atol=ATOL * np.abs(expected).max()
    )


def test_rows_longer_than_a_tile_equal_the_float64_model(tiny, qwen3_logits):
    """They attend tile by tile; short rows do not."""
    model, params = tiny
    token_ids = sequence(2, 300)
    q = jax.ShapeDtypeStruct((1, 300, 4, 8), "float32")
    assert why(q, mask="causal").startswith("xla_chunked")
    expected = qwen3_logits(params, model.config, token_ids)
    np.testing.assert_allclose(
        logits_of(model, params, token_ids), expected, rtol=0, atol=ATOL * np.abs(expected).max()
    )


def siblings():
    """Two prompts with three and two answers, tails with a masked middle: several samples share a row."""
    rng = np.random.default_rng(5)
    samples = []
    for prompt_length, tails in ((5, (3, 6, 4)), (3, (5, 2))):
        prompt = rng.integers(0, 64, prompt_length)
        for length in tails:
            token_ids = np.concatenate([prompt, rng.integers(0, 64, length)]).astype(np.int32)
            mask = np.arange(len(token_ids)) >= prompt_length
            mask[prompt_length + 1] = False
            samples.append(Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), 1.0))
    return samples


@functools.cache
def loss_fn(model):
    """Jitted (params, row) -> ((summed log-probability of trained tokens, (log-probabilities, entropies)), gradient)."""

    def run(params, row):
        module = model.bind(params)
        hidden = module.hidden(row.token_ids, row.positions, row.visible_until)
        logprobs, entropy = token_logprobs(hidden, module.unembedding_VD, row, with_entropy=True)
        return jnp.sum(row.loss_weights * logprobs), (logprobs, entropy)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def pack_row(samples):
    """The samples in one row of fields [1, T]."""
    return PackedBatch(*(field[0] for field in pack(samples, row_tokens=40, micro_rows=1, num_micro=1)))


def by_token(row, values):
    """{tokens of the sequence up to and with a trained one: its value}"""
    found = {}
    for t in np.flatnonzero(row.loss_weights[0]):
        chain = [int(t)]
        while row.parents[0, chain[-1]] >= 0:
            chain.append(int(row.parents[0, chain[-1]]))
        found[tuple(row.token_ids[0, chain[::-1]].tolist())] = float(values[0, t])
    return found


def test_a_packed_row_is_its_sequences_alone(tiny, qwen3_logits):
    """Log-probabilities, entropies and the gradient; the former also equal the float64 model's."""
    model, params = tiny
    run = loss_fn(model)
    samples = siblings()
    packed = pack_row(samples)
    assert (packed.segment_ids > 0).sum() < sum(len(s.token_ids) for s in samples), "no prompt is shared"
    (_, (logprobs, entropy)), gradient = run(params, packed)
    assert not np.asarray(logprobs)[packed.parents < 0].any(), "a token without a past has no log-probability"
    alone_logprobs, alone_gradients = {}, []
    for sample in samples:
        row = pack_row([sample])
        (_, (values, _)), gradient_alone = run(params, row)
        alone_logprobs |= by_token(row, values)
        alone_gradients.append(gradient_alone)

    entropies = by_token(packed, entropy)
    assert entropies.keys() == alone_logprobs.keys()
    for chain, value in by_token(packed, logprobs).items():
        logits = qwen3_logits(params, model.config, np.array(chain))[-2]
        log_p = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert value == pytest.approx(alone_logprobs[chain], abs=ATOL)
        assert value == pytest.approx(log_p[chain[-1]], abs=ATOL * np.abs(logits).max())
        assert entropies[chain] == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=ATOL * np.abs(logits).max())
    summed = jax.tree.map(lambda *parts: sum(parts), *alone_gradients)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(summed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=ATOL * scale), gradient, summed)


def test_bfloat16_activations_follow_float32_ones(tiny, tiny_config):
    model, params = tiny
    token_ids = sequence(1, 12)
    low = logits_of(Qwen3(tiny_config(compute_dtype="bfloat16")), params, token_ids)
    high = logits_of(model, params, token_ids)
    assert low.dtype == np.float32
    # Some dozen roundings to 8 bits along the residual stream.
    np.testing.assert_allclose(low, high, rtol=0, atol=2**-5 * np.abs(high).max())


@pytest.mark.parametrize("tied", [True, False])
def test_float32_logits_of_bfloat16_activations_are_not_rounded_again(tiny_config, random_params, tied):
    config = tiny_config(compute_dtype="bfloat16", logit_dtype="float32", tie_word_embeddings=tied)
    params = random_params(Qwen3(config))
    x_TD = jnp.asarray(np.random.default_rng(0).standard_normal((5, config.hidden_size)), jnp.bfloat16)

    def ours(config: ModelConfig) -> jax.Array:
        module = Qwen3(config).bind(params)
        return module.logits(module.finish(x_TD))

    x = np.asarray(x_TD, np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * np.asarray(params["final_norm"])
    exact = normed @ np.asarray(params["embed" if tied else "unembed"], np.float64).T
    error = {d: np.abs(ours(config.model_copy(update={"logit_dtype": d})) - exact).max() for d in ("float32", None)}
    assert error["float32"] < 1e-5 * np.abs(exact).max() < 1e-3 * np.abs(exact).max() < error[None]


MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (2, 2, 1, 2), (1, 2, 2, 2)]


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_shard_over_eight_devices(size):
    model = Qwen3(PUBLISHED[size])
    num_params = model.num_params()
    for shape in MESHES:
        mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
        places = jax.tree.leaves(model.shardings(mesh))
        arrays = jax.tree.leaves(model.abstract_params())
        per_device = sum(math.prod(p.shard_shape(a.shape)) for p, a in zip(places, arrays, strict=True))
        num_shards = shape[1] * shape[3]
        # Only norms and biases, less than a thousandth, may lie whole on every device.
        assert per_device == pytest.approx(num_params / num_shards, rel=1e-3)


def test_a_size_that_does_not_divide_is_refused():
    model = Qwen3(
        ModelConfig(
            vocab_size=64,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
        )
    )
    mesh = AbstractMesh((1, 8, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with pytest.raises(
        ValueError,
        match=r"axis 'embed' of size 12 does not divide over mesh axes \('fsdp',\) of size 8; allowed: 1, 2, 3, 4, 6$",
    ):
        model.shardings(mesh)


def test_two_axes_of_an_array_on_one_mesh_axis_are_refused():
    mesh = AbstractMesh((1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with pytest.raises(
        ValueError, match=r"axes 'heads' and 'mlp' \(of size 8\) both lie on mesh axis 'tensor'; allowed:"
    ):
        sharding(mesh, (4, 8), ("heads", "mlp"))
