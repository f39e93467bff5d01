"""Attention under the mask `k <= q < end[k]`, against float64 NumPy that knows only who may see whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.api import attention

B, T, H = 2, 12, 4
SCALE = H**-0.5
# Float32 sums of at most T terms of size about 1: a few dozen roundings of 6e-8.
ATOL = 1e-5
seeded = settings(derandomize=True, deadline=None, max_examples=50)

run = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask, scale=SCALE))


@jax.jit
def gradients(q, k, v, mask, w):
    return jax.grad(lambda *qkv: jnp.sum(w * attention(*qkv, mask=mask, scale=SCALE)), (0, 1, 2))(q, k, v)


def draw(seed, num_heads=2, num_kv_heads=2, dtype=np.float32):
    """q, k, v and the weight of each output in a scalar loss."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, n, H) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def sees(end_T):
    """bool[T, T] by the definition: query q sees key k iff k <= q < end[k]."""
    return np.array([[k <= q < end_T[k] for k in range(len(end_T))] for q in range(len(end_T))])


def oracle(q, k, v, end, w=None):
    """Outputs, and the gradients of sum(w * output) by q, k and v; a loop over rows and heads."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    G = q.shape[2] // k.shape[2]
    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        mask = sees(end[b])
        for n in range(q.shape[2]):
            q_TH, k_SH, v_SH = q[b, :, n], k[b, :, n // G], v[b, :, n // G]
            e = np.where(mask, np.exp(SCALE * q_TH @ k_SH.T), 0.0)
            p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
            o[b, :, n] = p @ v_SH
            if w is None:
                continue
            dp = w[b, :, n].astype(np.float64) @ v_SH.T
            ds = SCALE * p * (dp - (p * dp).sum(-1, keepdims=True))
            dq[b, :, n] = ds @ k_SH
            dk[b, :, n // G] += ds.T @ q_TH
            dv[b, :, n // G] += p.T @ w[b, :, n]
    return o, (dq, dk, dv)


@st.composite
def forests(draw_from):
    """(end i32[T], path of every position or None): trees of segments in preorder, then padding.

    A path is the positions that a token may see: its segment so far and all segments above it.
    """
    end, paths = np.zeros(T, np.int32), [None] * T
    num_tokens = draw_from(st.integers(0, T))
    open_segments: list[list[int]] = []
    position = 0
    while position < num_tokens:
        depth = draw_from(st.integers(0, len(open_segments)))
        open_segments = open_segments[:depth]
        length = draw_from(st.integers(1, num_tokens - position))
        segment = list(range(position, position + length))
        above = [t for other in open_segments for t in other]
        for i, t in enumerate(segment):
            paths[t] = above + segment[: i + 1]
        open_segments.append(segment)
        position += length
        for t in (t for other in open_segments for t in other):
            end[t] = position
    return end, paths


def packed_example():
    """Rows that packing makes: a prompt [0..3] with two answers, a causal row; then padding."""
    shared = [8] * 4 + [6] * 2 + [8] * 2 + [0] * 4
    causal = [12] * 12
    return np.array([shared, causal], np.int32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (4, 2), (4, 1), (6, 3)])
def test_forward_and_gradient_at_every_gqa_ratio(num_heads, num_kv_heads):
    q, k, v, w = draw(0, num_heads, num_kv_heads)
    end = packed_example()
    expected, expected_gradients = oracle(q, k, v, end, w)
    np.testing.assert_allclose(run(q, k, v, end), expected, rtol=0, atol=ATOL)
    for got, wanted in zip(gradients(q, k, v, end, w), expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * ATOL)


@given(st.lists(forests(), min_size=B, max_size=B), st.integers(0, 2**16))
@seeded
def test_a_forest_is_its_paths_one_by_one(rows, seed):
    """Every token attends as the last one of its own causal sequence would; padding yields 0, without NaN."""
    q, k, v, w = draw(seed)
    end = np.stack([end for end, _ in rows])
    o = np.asarray(run(q, k, v, end))
    for b, (_, paths) in enumerate(rows):
        for t, path in enumerate(paths):
            if path is None:
                assert not o[b, t].any()
                continue
            alone = [x[b : b + 1, path] for x in (q, k, v)]
            expected, _ = oracle(*alone, np.full((1, len(path)), len(path)))
            np.testing.assert_allclose(o[b, t], expected[0, -1], rtol=0, atol=ATOL)
    _, expected_gradients = oracle(q, k, v, end, w)
    for got, wanted in zip(gradients(q, k, v, end, w), expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * ATOL)


@given(st.lists(st.integers(-1, T + 1), min_size=T, max_size=T), st.integers(0, T - 1), st.integers(0, 2**16))
@seeded
def test_an_invisible_key_changes_no_bit(end_T, key, seed):
    """Under any mask, forest or not."""
    q, k, v, _ = draw(seed)
    end = np.array([end_T] * B, np.int32)
    before = np.asarray(run(q, k, v, end))
    k[:, key] = 1e4
    v[:, key] = -1e4
    after = np.asarray(run(q, k, v, end))
    blind = ~sees(end_T)[:, key]
    np.testing.assert_array_equal(before[:, blind], after[:, blind])


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    q, k, v, w = draw(1)
    end = np.zeros((B, T), np.int32)
    assert not np.asarray(run(q, k, v, end)).any()
    for gradient in gradients(q, k, v, end, w):
        assert not np.asarray(gradient).any()


def test_large_scores_do_not_overflow():
    q, k, v, w = draw(2)
    end = packed_example()
    # Products of about 1e6, whose exponential no float holds; the softmax is then an argmax.
    q *= 1e4
    k *= 1e2
    o = np.asarray(run(q, k, v, end))
    scores = np.where(sees(end[1]), SCALE * q[1, :, 0].astype(np.float64) @ k[1, :, 0].T, -np.inf)
    np.testing.assert_allclose(o[1, :, 0], v[1, scores.argmax(-1), 0], rtol=0, atol=ATOL)
    assert all(np.isfinite(gradient).all() for gradient in gradients(q, k, v, end, w))


def test_bfloat16_keeps_float32_softmax():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(3, 4, 2)]
    q, k, v, _ = (np.asarray(x, np.float32) for x in inputs)
    end = packed_example()
    got = run(*inputs[:3], end)
    assert got.dtype == jnp.bfloat16
    # Weights and outputs are rounded to 8 bits (relative 2**-9 each); scores are not.
    expected, _ = oracle(q, k, v, end)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=2**-7 * np.abs(v).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, T + 1, 2, H)}, "k and v must both be"),
        ({"k": (B, T, 2, H + 1)}, "k and v must both be"),
        ({"v": (B, T, 1, H)}, "k and v must both be"),
        ({"k": (B, T, 3, H), "v": (B, T, 3, H)}, "query heads N=4 are not a multiple of key-value heads K=3"),
        ({"mask": (B, T - 1)}, "mask must be"),
        ({"mask": (T,)}, "mask must be"),
        ({"implementation": "fast"}, "implementation='fast'; allowed: 'auto', 'reference'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (B, T, 4, H), "k": (B, T, 2, H), "v": (B, T, 2, H), "mask": (B, T)} | change
    implementation = shapes.pop("implementation", "auto")
    q, k, v, mask = (np.zeros(shape, np.float32) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, mask=mask.astype(np.int32), scale=SCALE, implementation=implementation)
