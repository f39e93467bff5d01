"""The TPU kernels, interpreted: against float64 NumPy, for races, and through the model's one function."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import pallas_tpu
from kernels.attention.api import attention, why
from kernels.attention.gradient import delta
from kernels.attention.mask import segment_ends, tree_ends
from kernels.attention.tiles import tile
from tests.kernels.devices import V5E, interpreted, tpu_races
from tests.kernels.oracle import at_hand, attend, forests, sees

B, T, N, K, H = 2, 24, 4, 2, 8
SCALE = H**-0.5
ATOL = 1e-5
"""Float32 sums of at most T terms of size about 1: a few dozen roundings of 6e-8."""


def draw(seed, num_tokens=T):
    """q, k, v and the gradients of outputs and log-sum-exps."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(B, num_tokens, n, H)).astype(np.float32) for n in (N, K, K, N)]
    return *arrays, rng.normal(size=(B, num_tokens, N)).astype(np.float32)


def run(q, k, v, do, dlse, end, softcap=None, params=True, block_q=4, block_k=8, window=None, place=None):
    """(outputs, log-sum-exps, gradients); rows that see nothing get no gradient of their log-sum-exp.

    With `place` i32[B, I] the queries at hand are those tiles of their rows.
    """
    mask = tile(jnp.asarray(end), block_q=block_q, block_k=block_k, window=window, place_BI=place)
    if place is not None:
        q, do, dlse = (at_hand(x, place, block_q) for x in (q, do, dlse))
    with interpreted(V5E, params):
        o, lse = pallas_tpu.forward(q, k, v, mask, SCALE, softcap)
        dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
        return o, lse, pallas_tpu.backward(q, k, v, mask, SCALE, softcap, lse, do, delta(o, do, dlse))


jitted = jax.jit(run, static_argnames=("softcap", "params", "block_q", "block_k", "window"))


def check(got, inputs, end, softcap=None, window=None, place=None, block_q=4):
    *qkv, do, dlse = inputs
    if place is not None:  # queries elsewhere have no part in the loss
        held = np.zeros((B, T // block_q, block_q, 1), np.float32)
        held[np.arange(B)[:, None], place] = 1
        do, dlse = do * held.reshape(B, T, 1, 1), dlse * held.reshape(B, T, 1)
    o, lse, gradients = got
    wanted_o, wanted_lse, wanted = attend(*qkv, [sees(row, window) for row in end], SCALE, do, dlse, softcap)
    if place is not None:
        wanted_o, wanted_lse, dq = (at_hand(x, place, block_q) for x in (wanted_o, wanted_lse, wanted[0]))
        wanted = (dq, *wanted[1:])
    np.testing.assert_allclose(o, wanted_o, rtol=0, atol=ATOL)
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=ATOL)
    for x, y in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=4 * ATOL)


@given(rows=st.lists(forests(T), min_size=B, max_size=B), seed=st.integers(0, 2**16))
@settings(derandomize=True, deadline=None, max_examples=15)
def test_forests(rows, seed):
    inputs, end = draw(seed), np.stack([end for end, _ in rows])
    check(jitted(*inputs, end), inputs, end)


@given(
    rows=st.lists(forests(T), min_size=B, max_size=B), places=st.permutations(range(T // 4)), seed=st.integers(0, 99)
)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_windows_and_placed_queries(rows, places, seed):
    """Half of the tiles of each row, in any order, as one of two devices holds them; the window divides no tile."""
    inputs, end = draw(seed), np.stack([end for end, _ in rows])
    place = np.reshape(places, (B, -1)).astype(np.int32)
    check(jitted(*inputs, end, 2.0, window=5, place=place), inputs, end, 2.0, 5, place)


@pytest.mark.slow
@pytest.mark.parametrize(("block_q", "block_k", "softcap"), [(8, 4, None), (8, 8, 1.5), (16, 16, None)])
@given(end=st.lists(st.lists(st.integers(-1, T + 1), min_size=T, max_size=T), min_size=B, max_size=B))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_any_mask_any_blocks(block_q, block_k, softcap, end):
    """Masks that are no trees too; 16 does not divide T=24."""
    inputs, end = draw(0), np.array(end, np.int32)
    check(jitted(*inputs, end, softcap, block_q=block_q, block_k=block_k), inputs, end, softcap)


@pytest.mark.slow
def test_no_races_and_nothing_read_before_it_is_written():
    """The interpreter that simulates a TPU's memories fills fresh ones with NaN."""
    inputs = draw(1)
    end = np.stack([np.pad(tree_ends([6, 4, 3, 5], [-1, 0, 1, 0]), (0, 6)), np.full(T, T)]).astype(np.int32)
    params = pltpu.InterpretParams(detect_races=True)
    got = run(*inputs, end, softcap=2.0, params=params, block_q=8)
    check(got, inputs, end, softcap=2.0)
    assert not tpu_races()
    place = np.array([[2, 0], [2, 1]], np.int32)
    got = run(*inputs, end, params=params, block_q=8, window=5, place=place)
    check(got, inputs, end, window=5, place=place, block_q=8)
    assert not tpu_races()


@pytest.mark.slow
def test_the_detector_finds_a_copy_that_nobody_waited_for():
    def kernel(x, o, scratch, semaphore):
        copy = pltpu.make_async_copy(x, scratch, semaphore)
        copy.start()
        o[...] = scratch[...]
        copy.wait()

    x = jnp.ones((8, 128))
    pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )(x).block_until_ready()
    assert tpu_races()


def test_invisible_tiles_are_never_read():
    """Keys and values that are NaN reach nobody through a tile that no query sees."""
    q, k, v, do, dlse = draw(2)
    end = np.tile(segment_ends(np.repeat([1, 2, 0], 8)), (B, 1))
    k[:, 16:], v[:, 16:] = np.nan, np.nan
    o, lse, gradients = jitted(q, k, v, do, dlse, end)
    for x in (o, *gradients):
        assert np.isfinite(x).all()
    k[:, :8] = np.nan
    assert np.isfinite(np.asarray(jitted(q, k, v, do, dlse, end)[0])[:, 8:16]).all()


def test_visits_are_the_active_tiles_each_once():
    """And one more for each outer tile that sees nothing, whose outputs must be written all the same."""
    end = tree_ends([6, 4, 3, 5], [-1, 0, 1, 0])
    end = np.pad(end, (0, 14)).astype(np.int32)
    mask = jax.jit(partial(tile, block_q=4, block_k=4))(end[None])
    full_IJ = np.asarray(mask.full_BIJ[0])
    seen = sees(end).reshape(8, 4, 8, 4)
    for tiles, num, full, active_OI in (
        (mask.k_tiles_BIJ[0], mask.num_k_BI[0], full_IJ, seen.any((1, 3))),
        (mask.q_tiles_BJI[0], mask.num_q_BJ[0], full_IJ.T, seen.any((1, 3)).T),
    ):
        room = pallas_tpu.num_visits(32, 4, 4)
        codes, count = jax.jit(pallas_tpu._visits, static_argnums=2)((tiles, num), full, room)
        assert count == active_OI.sum() + (~active_OI.any(1)).sum()
        visits = pallas_tpu._Visit.of(np.asarray(codes)[: int(count)])
        at = list(zip(visits.outer[visits.active], visits.inner[visits.active], strict=True))
        assert at == list(zip(*np.nonzero(active_OI), strict=True))
        assert (full[visits.outer, visits.inner] == visits.full).all()
        changes = np.flatnonzero(np.diff(visits.outer)) + 1
        assert np.flatnonzero(visits.first).tolist() == [0, *changes]
        assert np.flatnonzero(visits.last).tolist() == [*(changes - 1), count - 1]


def test_attention_takes_it_for_a_tpu():
    """Forward and gradient through the one function, in tiles as large as a TPU's."""
    q, k, v, do, _ = (x.repeat(8, -1) for x in (*draw(3, 300)[:4], np.zeros((1, 1))))
    end = np.stack([segment_ends(np.repeat([1, 2, 0], [200, 90, 10])), tree_ends([130, 100, 70], [-1, 0, 0])])

    def loss(q, k, v, implementation):
        return jnp.sum(do * attention(q, k, v, mask=jnp.asarray(end), scale=0.1, implementation=implementation))

    grad = partial(jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3), q, k, v)
    expected = grad("reference")
    with interpreted(V5E):
        assert why(q, mask=end) == "pallas_tpu: it visits active tiles only, on a TPU"
        got = grad("auto")
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) < 1e-5 * np.linalg.norm(y)
