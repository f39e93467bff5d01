"""Log-probabilities, entropies and their gradients against float64."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.logprob.api import linear_logprob
from kernels.logprob.reference import log_probabilities

B, T, D, V = 2, 7, 16, 50
seeded = settings(derandomize=True, deadline=None, max_examples=30)


def draw(seed, spread=1.0, dtype=np.float32, num_tokens=T, width=D, vocabulary=V):
    """hidden, unembedding, targets, and the weights of both outputs in a scalar loss."""
    rng = np.random.default_rng(seed)
    hidden = (spread * rng.normal(size=(B, num_tokens, width))).astype(dtype)
    unembedding = rng.normal(size=(vocabulary, width)).astype(dtype)
    targets = rng.integers(0, vocabulary, (B, num_tokens), dtype=np.int32)
    return hidden, unembedding, targets, *rng.normal(size=(2, B, num_tokens)).astype(np.float32)


def oracle(hidden, unembedding, targets, w, u):
    """float64: log-probabilities, entropies, and the gradients of sum(w * logprobs + u * entropies)."""
    h, m = hidden.astype(np.float64), unembedding.astype(np.float64)
    logits = h @ m.T
    log_p = logits - logits.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    p, hits = np.exp(log_p), np.eye(len(m))[targets]
    entropy = -(p * log_p).sum(-1)
    dlogits = w[..., None] * (hits - p) - u[..., None] * p * (log_p + entropy[..., None])
    return (log_p * hits).sum(-1), entropy, dlogits @ m, np.einsum("btv,btd->vd", dlogits, h)


@partial(jax.jit, static_argnames=("chunk_tokens", "with_entropy"))
def run(hidden, unembedding, targets, w, u, *, chunk_tokens, with_entropy):
    def loss(hidden, unembedding):
        logprobs, entropy = linear_logprob(
            hidden, unembedding, targets, chunk_tokens=chunk_tokens, with_entropy=with_entropy
        )
        return jnp.sum(w * logprobs) + (jnp.sum(u * entropy) if with_entropy else 0.0), (logprobs, entropy)

    gradients, outputs = jax.grad(loss, (0, 1), has_aux=True)(hidden, unembedding)
    return *outputs, *gradients


@pytest.mark.parametrize("chunk_tokens", [1, 6, 10**6], ids=["one", "several", "all"])
@given(seed=st.integers(0, 2**16), spread=st.sampled_from([0.0, 1.0, 30.0]))
@seeded
def test_float32_within_1e_4_nats(chunk_tokens, seed, spread):
    """Up to log-probabilities of several hundred nats."""
    inputs = draw(seed, spread)
    expected = oracle(*inputs)
    got = run(*inputs, chunk_tokens=chunk_tokens, with_entropy=True)
    for value, wanted in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4)
    for value, wanted in zip(got[2:], expected[2:], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))


def test_bfloat16_within_1e_2_nats():
    """At a model's sizes of logits: log-probabilities down to -60, where bfloat16 itself steps by 0.25."""
    hidden, unembedding, targets, w, u = draw(0, spread=0.5, width=512, vocabulary=3000)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembedding)]
    expected = oracle(*(np.asarray(x, np.float32) for x in low), targets, w, u)
    assert expected[0].min() < -40
    got = run(*low, targets, w, u, chunk_tokens=4, with_entropy=True)
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    for value, wanted in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-2)
    for value, wanted in zip(got[2:], expected[2:], strict=True):
        # Gradients are products of numbers of 8 bits, summed in float32.
        assert np.linalg.norm(np.asarray(value, np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_without_entropy_nothing_of_it_is_computed():
    inputs = draw(1)
    logprobs, entropy, *gradients = run(*inputs, chunk_tokens=6, with_entropy=False)
    expected = oracle(*inputs[:4], np.zeros((B, T)))
    assert entropy is None
    np.testing.assert_allclose(logprobs, expected[0], rtol=0, atol=1e-4)
    for value, wanted in zip(gradients, expected[2:], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4)

    def num_products(with_entropy):
        return run.lower(*inputs, chunk_tokens=6, with_entropy=with_entropy).as_text().count("stablehlo.multiply")

    assert num_products(with_entropy=False) < num_products(with_entropy=True)


def test_the_reference_is_the_oracle_too():
    inputs = draw(2)
    expected = oracle(*inputs)
    for value, wanted in zip(log_probabilities(*inputs[:3]), expected[:2], strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-4)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """Scratch of both passes at twice the length: the logits of the added tokens would be hundred times the growth."""
    vocabulary = 8192

    def scratch_bytes(num_tokens):
        hidden = jax.ShapeDtypeStruct((1, num_tokens, 8), jnp.float32)
        unembedding = jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32)
        ints, floats = (jax.ShapeDtypeStruct((1, num_tokens), dtype) for dtype in (jnp.int32, jnp.float32))
        lowered = run.lower(hidden, unembedding, ints, floats, floats, chunk_tokens=128, with_entropy=True)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert scratch_bytes(4096) - scratch_bytes(2048) < 4 * 2048 * vocabulary / 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unembedding": np.zeros((V, D + 1), np.float32)}, r"unembedding must be \[V, D=16\]"),
        ({"targets": np.zeros((B, T + 1), np.int32)}, r"targets must be \[B=2, T=7\]"),
        ({"unembedding": np.zeros((V, D), np.float16)}, "must share one dtype"),
        ({"chunk_tokens": 0}, "chunk_tokens=0; allowed: at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, unembedding, targets, *_ = draw(0)
    arguments = {"hidden": hidden, "unembedding": unembedding, "targets": targets, "chunk_tokens": 4} | change
    chunk_tokens = arguments.pop("chunk_tokens")
    with pytest.raises(ValueError, match=message):
        linear_logprob(*arguments.values(), chunk_tokens=chunk_tokens)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from kernels.logprob.api import linear_logprob

B, T, D, V = 4, 12, 16, 64
rng = np.random.default_rng(0)
h, m = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D)))
targets, w, u = rng.integers(0, V, (B, T)), *rng.normal(size=(2, B, T)).astype(np.float32)

def run(h, m):
    def loss(h, m):
        logprobs, entropy = linear_logprob(h, m, targets, with_entropy=True, chunk_tokens=16)
        return jnp.sum(w * logprobs + u * entropy), (logprobs, entropy)
    return jax.grad(loss, (0, 1), has_aux=True)(h, m)

expected = jax.jit(run)(h, m)
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rows, vocabulary = NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor"))
places = ((rows, vocabulary), (rows, rows))
program = jax.jit(run, in_shardings=(rows, vocabulary), out_shardings=places).lower(h, m).compile()
for one, many in zip(jax.tree.leaves(expected), jax.tree.leaves(program(*map(jax.device_put, (h, m), (rows, vocabulary)))), strict=True):
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-5)
gathers = [line for line in program.as_text().splitlines() if " all-gather(" in line]
assert not gathers, gathers
"""


def test_a_vocabulary_sharded_over_devices_stays_where_it_is():
    """Eight simulated devices compute what one does, and no collective but sums: nothing is gathered."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
