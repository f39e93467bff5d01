"""Every path of attention, forward and gradient, against float64 NumPy (oracle.py)."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import choice
from kernels.attention.api import attention, why
from kernels.attention.mask import segment_ends, tree_ends
from kernels.attention.tiles import tile
from kernels.compat import Target
from tests.kernels.oracle import attend, forests, sees

B, T, H = 2, 12, 4
SCALE = H**-0.5
# Float32 sums of at most T terms of size about 1: a few dozen roundings of 6e-8.
ATOL = 1e-5
seeded = settings(derandomize=True, deadline=None, max_examples=50)
PATHS = ["reference", "xla_chunked"]


def call(path, q, k, v, end, window=None, softcap=None):
    """(outputs, log-sum-exps); the chunked path in tiles of 4 queries and 2 keys."""
    mask = tile(jnp.asarray(end), window=window, block_q=4, block_k=2) if path != "reference" else jnp.asarray(end)
    options = {"mask": mask, "scale": SCALE, "window": window, "softcap": softcap}
    return attention(q, k, v, **options, implementation=path, return_lse=True)


run = jax.jit(call, static_argnums=(0, 5, 6))


def _loss(q, k, v, path, end, w, u, window, softcap):
    o, lse = call(path, q, k, v, end, window, softcap)
    return jnp.sum(w * o) + jnp.sum(jnp.where(jnp.isfinite(lse), u * lse, 0.0))


@partial(jax.jit, static_argnums=(0, 7, 8))
def gradients(path, q, k, v, end, w, u, window=None, softcap=None):
    return jax.grad(_loss, (0, 1, 2))(q, k, v, path, end, w, u, window, softcap)


def draw(seed, num_heads=4, num_kv_heads=2, num_tokens=T):
    """q, k, v and the weights of each output and log-sum-exp in a scalar loss."""
    rng = np.random.default_rng(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    arrays = [rng.normal(size=(B, num_tokens, n, H)).astype(np.float32) for n in heads]
    return *arrays, rng.normal(size=(B, num_tokens, num_heads)).astype(np.float32)


def check(path, seed, end, num_heads=4, num_kv_heads=2, window=None, softcap=None):
    """Outputs, log-sum-exps and gradients equal the oracle's."""
    q, k, v, w, u = draw(seed, num_heads, num_kv_heads, end.shape[1])
    masks = [sees(row, window) for row in end]
    expected_o, expected_lse, expected = attend(q, k, v, masks, SCALE, w, u, softcap)
    o, lse = run(path, q, k, v, end, window, softcap)
    np.testing.assert_allclose(o, expected_o, rtol=0, atol=ATOL)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=ATOL)
    for got, wanted in zip(gradients(path, q, k, v, end, w, u, window, softcap), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=4 * ATOL)


def packed_example():
    """Rows that packing makes: a prompt [0..3] with two answers, a causal row; then padding."""
    shared = [8] * 4 + [6] * 2 + [8] * 2 + [0] * 4
    causal = [12] * 12
    return np.array([shared, causal], np.int32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (6, 3)])
def test_forward_and_gradient_at_every_gqa_ratio(path, num_heads, num_kv_heads):
    check(path, 0, packed_example(), num_heads, num_kv_heads)


@pytest.mark.parametrize("num_tokens", [1, 11])
def test_lengths_that_tiles_do_not_divide(num_tokens):
    held = min(2, num_tokens)
    end = np.array([[num_tokens] * num_tokens, [held] * held + [0] * (num_tokens - held)], np.int32)
    check("xla_chunked", 1, end)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 1.5)])
@given(rows=st.lists(forests(T), min_size=B, max_size=B), seed=st.integers(0, 2**16))
@seeded
def test_forests_windows_and_softcaps(path, window, softcap, rows, seed):
    check(path, seed, np.stack([end for end, _ in rows]), window=window, softcap=softcap)


@pytest.mark.parametrize("path", PATHS)
@given(rows=st.lists(forests(T), min_size=B, max_size=B), seed=st.integers(0, 2**16))
@seeded
def test_a_forest_is_its_paths_one_by_one(path, rows, seed):
    """Every token attends as the last one of its own causal sequence would; padding yields 0, without NaN."""
    q, k, v, *_ = draw(seed)
    o, lse = map(np.asarray, run(path, q, k, v, np.stack([end for end, _ in rows])))
    for b, (_, paths) in enumerate(rows):
        for t, chain in enumerate(paths):
            if chain is None:
                assert not o[b, t].any()
                assert (lse[b, t] == -np.inf).all()
                continue
            alone = [x[b : b + 1, chain] for x in (q, k, v)]
            expected, _, _ = attend(*alone, [np.tri(len(chain), dtype=bool)], SCALE)
            np.testing.assert_allclose(o[b, t], expected[0, -1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("path", PATHS)
@given(end=st.lists(st.integers(-1, T + 1), min_size=T, max_size=T), key=st.integers(0, T - 1), seed=st.integers(0, 99))
@seeded
def test_an_invisible_key_changes_no_bit(path, end, key, seed):
    """Under any mask, forest or not."""
    q, k, v, *_ = draw(seed)
    ends = np.array([end] * B, np.int32)
    before = [np.asarray(x) for x in run(path, q, k, v, ends)]
    k[:, key] = 1e4
    v[:, key] = -1e4
    after = [np.asarray(x) for x in run(path, q, k, v, ends)]
    blind = ~sees(end)[:, key]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[:, blind], new[:, blind])


@pytest.mark.parametrize("path", PATHS)
def test_answers_permute_freely(path):
    """Two orders of a prompt's answers: the same outputs and gradients, moved."""
    lengths, order = np.array([4, 3, 1, 4]), [2, 0, 1]
    starts = np.cumsum(lengths) - lengths
    answers = [np.arange(s, s + n) for s, n in zip(starts[1:], lengths[1:], strict=True)]
    moved = np.concatenate([np.arange(4), *(answers[i] for i in order)])
    q, k, v, w, u = draw(5)
    qm, km, vm, wm, um = (x[:, moved] for x in (q, k, v, w, u))
    one, two = (np.tile(tree_ends(x, [-1, 0, 0, 0]), (B, 1)) for x in (lengths, [4, *lengths[1:][order]]))
    results = (*run(path, q, k, v, one), *gradients(path, q, k, v, one, w, u))
    moved_results = (*run(path, qm, km, vm, two), *gradients(path, qm, km, vm, two, wm, um))
    for x, y in zip(results, moved_results, strict=True):
        np.testing.assert_allclose(np.asarray(x)[:, moved], y, rtol=0, atol=4 * ATOL)


@pytest.mark.parametrize("path", PATHS)
def test_a_group_split_in_two_rows_changes_nothing(path):
    """A prompt with two answers in one row, or one answer in each of two rows with a copy of the prompt each."""
    prompt, answers = np.arange(4), (np.arange(4, 9), np.arange(9, 12))
    q, k, v, w, u = draw(6)
    w[:, prompt], u[:, prompt] = 0, 0
    together = np.tile(tree_ends([4, 5, 3], [-1, 0, 0]), (B, 1))
    o, _ = run(path, q, k, v, together)
    whole = [np.asarray(x) for x in gradients(path, q, k, v, together, w, u)]

    chains = [np.concatenate([prompt, answer]) for answer in answers]
    source = np.stack([np.pad(chain, (0, T - len(chain))) for chain in chains])  # of both rows, from row 0
    apart = np.stack([np.where(np.arange(T) < len(chain), len(chain), 0) for chain in chains]).astype(np.int32)
    inputs = [x[0][source] for x in (q, k, v, w, u)]
    o_apart, _ = run(path, *inputs[:3], apart)
    parts = gradients(path, *inputs[:3], apart, *inputs[3:])
    for b, chain in enumerate(chains):
        np.testing.assert_allclose(np.asarray(o_apart)[b, : len(chain)], np.asarray(o)[0, chain], rtol=0, atol=ATOL)
    for got, part in zip(whole, parts, strict=True):
        summed = np.zeros_like(got[0])
        for b, chain in enumerate(chains):
            summed[chain] += np.asarray(part)[b, : len(chain)]
        np.testing.assert_allclose(got[0], summed, rtol=0, atol=4 * ATOL)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(path):
    q, k, v, w, u = draw(1)
    end = np.zeros((B, T), np.int32)
    o, lse = run(path, q, k, v, end)
    assert not np.asarray(o).any()
    assert (np.asarray(lse) == -np.inf).all()
    for gradient in gradients(path, q, k, v, end, w, u):
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize("path", PATHS)
def test_large_scores_do_not_overflow(path):
    q, k, v, w, u = draw(2)
    end = packed_example()
    # Products of about 1e6, whose exponential no float holds; the softmax is then an argmax.
    q *= 1e4
    k *= 1e2
    o = np.asarray(run(path, q, k, v, end)[0])
    scores = np.where(sees(end[1]), SCALE * q[1, :, 0].astype(np.float64) @ k[1, :, 0].T, -np.inf)
    np.testing.assert_allclose(o[1, :, 0], v[1, scores.argmax(-1), 0], rtol=0, atol=ATOL)
    assert all(np.isfinite(gradient).all() for gradient in gradients(path, q, k, v, end, w, u))


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_keeps_float32_softmax(path):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in draw(3)]
    q, k, v, w, u = (np.asarray(x, np.float32) for x in inputs)
    end = packed_example()
    got, lse = run(path, *inputs[:3], end)
    assert (got.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    # Weights and outputs are rounded to 8 bits (relative 2**-9 each); scores are not.
    expected, expected_lse, expected_gradients = attend(q, k, v, [sees(row) for row in end], SCALE, w, u)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=2**-7 * np.abs(v).max())
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=ATOL)
    for gradient, wanted in zip(gradients(path, *inputs[:3], end, *inputs[3:]), expected_gradients, strict=True):
        error = np.linalg.norm(np.asarray(gradient, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < 1e-2


def test_invisible_tiles_are_never_read():
    """Keys and values that are NaN reach nobody through a tile that no query sees, in neither pass.

    A path that computes a tile and masks it afterwards fails: 0 * NaN is NaN.
    """
    q, k, v, w, u = draw(4)
    end = np.tile(segment_ends(np.repeat([1, 2, 0], 4)), (B, 1))
    for x in (q, k, v, w, u):
        x[:, 8:] = np.nan
    o, lse = run("xla_chunked", q, k, v, end)
    assert np.isfinite(np.asarray(o)[:, :8]).all()
    assert np.isfinite(np.asarray(lse)[:, :8]).all()
    k[:, :4] = np.nan
    assert np.isfinite(np.asarray(run("xla_chunked", q, k, v, end)[0])[:, 4:8]).all()
    q, k, v, w, u = draw(4)
    k[:, 8:] = np.nan
    for gradient in gradients("xla_chunked", q, k, v, end, w, u):
        assert np.isfinite(gradient).all()
    assert np.isnan(np.asarray(gradients("reference", q, k, v, end, w, u)[0])).any(), "the test would miss it"


def test_memory_of_tiles_is_linear():
    """Scratch of forward and backward at twice the length: twice as much, where dense scores would take four times."""

    def scratch_bytes(num_tokens):
        q = jax.ShapeDtypeStruct((1, num_tokens, 2, 16), jnp.float32)
        end = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

        def loss(q, k, v, end):
            return jnp.sum(attention(q, k, v, mask=end, scale=1.0, implementation="xla_chunked"))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q, end).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch_bytes(4096) < 2.2 * scratch_bytes(2048)


def test_causal_needs_no_array():
    q, k, v, *_ = draw(7)
    expected, _ = run("reference", q, k, v, np.full((B, T), T, np.int32))
    for path in PATHS:
        got = jax.jit(partial(attention, mask="causal", scale=SCALE, implementation=path))(q, k, v)
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


def request_for(**changes):
    """A long dense causal row in bfloat16 on a GPU, but for `changes`."""
    fields = {"num_tokens": 8192, "head_dim": 128, "dtype": "bfloat16", "causal": True, "window": None}
    fields |= {"softcap": None, "return_lse": False, "block_q": 128, "block_k": 128}
    here = Target(changes.pop("backend", "gpu"), changes.pop("kind", "NVIDIA A100"), changes.pop("split", False))
    return choice.Request(**(fields | {"target": here} | changes))


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({}, "cudnn", "plain causal rows on an NVIDIA GPU"),
        ({"num_tokens": 128}, "reference", "rows of 128 tokens are at most one tile"),
        ({"backend": "cpu"}, "xla_chunked", "it skips invisible tiles on any device"),
        ({"causal": False}, "xla_chunked", "the mask is an array"),
        ({"window": 4}, "xla_chunked", "no window"),
        ({"softcap": 4.0}, "xla_chunked", "no window, softcap"),
        ({"return_lse": True}, "xla_chunked", "return_lse"),
        ({"dtype": "float32"}, "xla_chunked", "the inputs are float32"),
        ({"head_dim": 256}, "xla_chunked", "H=256"),
    ],
)
def test_auto_chooses_by_device_and_request(changes, path, reason):
    got, why_so = choice.choose("auto", request_for(**changes))
    assert got == path
    assert reason in why_so
    if path == "xla_chunked":
        with pytest.raises(ValueError, match="implementation='cudnn' cannot serve this: .*"):
            choice.choose("cudnn", request_for(**changes))


TPU = {"backend": "tpu", "kind": "TPU v5 lite"}
H100 = {"kind": "NVIDIA H100 80GB HBM3", "causal": False}


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        (TPU, "pallas_tpu", "it visits active tiles only, on a TPU"),
        (TPU | {"causal": False, "softcap": 2.0, "return_lse": True, "dtype": "float32"}, "pallas_tpu", "on a TPU"),
        (TPU | {"split": True}, "xla_chunked", "call it inside jax.shard_map"),
        (TPU | {"window": 4}, "pallas_tpu", "on a TPU"),
        (TPU | {"dtype": "float16"}, "xla_chunked", "the inputs are float16"),
        (TPU | {"head_dim": 80}, "xla_chunked", "H=80"),
        (TPU | {"block_k": 64}, "xla_chunked", "multiples of 128, and the mask's are 128 x 64"),
        (TPU | {"num_tokens": 131072}, "xla_chunked", "the row has 524,800 tiles, and the list holds 131,072"),
        (TPU | {"num_tokens": 131072, "num_queries": 8192}, "pallas_tpu", "on a TPU"),
        (TPU | {"num_tokens": 256, "num_queries": 128}, "pallas_tpu", "on a TPU"),
        (H100, "pallas_mosaic_gpu", "it reads active tiles only, on a Hopper GPU"),
        (H100 | {"softcap": 2.0, "return_lse": True, "dtype": "float16"}, "pallas_mosaic_gpu", "on a Hopper GPU"),
        (H100 | {"causal": True}, "cudnn", "plain causal rows"),
        (
            H100 | {"kind": "NVIDIA A100"},
            "xla_chunked",
            "it needs a Hopper GPU, as H100 and H200 are, and the device is NVIDIA A100",
        ),
        (H100 | {"split": True}, "xla_chunked", "call it inside jax.shard_map"),
        (H100 | {"window": 4}, "pallas_mosaic_gpu", "on a Hopper GPU"),
        (H100 | {"num_tokens": 256, "num_queries": 128}, "pallas_mosaic_gpu", "on a Hopper GPU"),
        (H100 | {"dtype": "float32"}, "xla_chunked", "the inputs are float32"),
        (H100 | {"head_dim": 256}, "xla_chunked", "H=256"),
        (H100 | {"block_k": 256}, "xla_chunked", "its tiles are 128 x 128, and the mask's are 128 x 256"),
    ],
)
def test_a_device_takes_its_kernel_where_it_serves(changes, path, reason):
    got, why_so = choice.choose("auto", request_for(**changes))
    assert got == path
    assert reason in why_so
    for kernel in ("pallas_tpu", "pallas_mosaic_gpu"):
        if kernel != path:
            with pytest.raises(ValueError, match=f"implementation='{kernel}' cannot serve this: "):
                choice.choose(kernel, request_for(**({"kind": "another"} | changes | {"split": True})))


def test_rows_that_devices_share_go_by_tiles():
    shared = request_for(causal=False, backend="cpu", num_tokens=256, num_queries=128)
    assert choice.choose("auto", shared)[0] == "xla_chunked"
    with pytest.raises(ValueError, match="implementation='reference' cannot serve this: it serves whole rows"):
        choice.choose("reference", shared)


def test_why_names_the_path_and_the_log_says_it_once(caplog):
    q = jax.ShapeDtypeStruct((1, 1000, 2, H), jnp.float32)
    line = why(q, mask="causal")
    assert line == "xla_chunked: it skips invisible tiles on any device"
    choice.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "kernels"):
        for _ in range(2):
            jax.eval_shape(lambda q: attention(q, q, q, mask="causal", scale=1.0), q)
    assert [record.getMessage() for record in caplog.records] == [f"attention takes {line}"]


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
        ({"implementation": "cudnn"}, "implementation='cudnn' cannot serve this: it needs an NVIDIA GPU"),
        ({"softcap": 0.0}, "softcap=0.0; allowed"),
        ({"window": 0}, "window=0; allowed"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    shapes = {"q": (B, T, 4, H), "k": (B, T, 2, H), "v": (B, T, 2, H), "mask": (B, T)} | change
    options = {name: shapes.pop(name) for name in ("implementation", "softcap", "window") if name in shapes}
    q, k, v, mask = (np.zeros(shape, np.float32) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, mask=mask.astype(np.int32), scale=SCALE, **options)


def test_masks_and_dtypes_that_do_not_fit_are_refused():
    q, k, v, *_ = draw(0)
    jit_tile = jax.jit(tile, static_argnames="window")
    tiled = jit_tile(jnp.full((B, T), T), window=3)
    for mask, options, message in (
        ("full", {}, "mask='full'; allowed: \"causal\""),
        (np.zeros((B, T), np.float32), {}, "mask must be ints"),
        (jit_tile(jnp.full((B, T + 1), T)), {}, r"it was tiled for \(2, 13\)"),
        (tiled, {"window": 4}, "window=4, but the mask was tiled for window=3"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, mask=mask, scale=SCALE, **options)
    with pytest.raises(ValueError, match="must share one dtype"):
        attention(q, k.astype(np.float16), v, mask="causal", scale=SCALE)
