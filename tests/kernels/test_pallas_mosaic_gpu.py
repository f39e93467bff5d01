"""The Hopper kernels without a GPU: interpreted with barriers, copies and race detection; lowered for CUDA."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import pallas_mosaic_gpu
from kernels.attention.api import attention, why
from kernels.attention.gradient import delta
from kernels.attention.mask import tree_ends
from kernels.attention.tiles import tile
from tests.kernels.devices import H100, gpu_memories, gpu_races, interpreted
from tests.kernels.oracle import attend, sees

T, SCALE = 240, 0.12


def draw(num_heads, num_kv_heads, H):
    """q, k, v, the gradient of the outputs, all bfloat16, and that of the log-sum-exps."""
    rng = np.random.default_rng(0)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    arrays = [jnp.asarray(rng.standard_normal((1, T, n, H)), jnp.bfloat16) for n in heads]
    return *arrays, rng.standard_normal((1, T, num_heads)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_outputs_and_gradients_without_races():
    """A prompt with two answers and padding over two tiles, two heads of a group, softcap; through the one function."""
    q, k, v, do, dlse = draw(2, 1, 64)
    end = np.pad(tree_ends([100, 60, 70], [-1, 0, 0]), (0, T - 230))[None]
    exact = [np.asarray(x, np.float64) for x in (q, k, v, do)]
    wanted_o, wanted_lse, wanted = attend(*exact[:3], [sees(end[0])], SCALE, exact[3], dlse, softcap=2.0)

    with interpreted(H100, gpu_memories()):
        assert why(q, mask=end, softcap=2.0) == "reference: rows of 240 tokens are at most one tile of 256"

        def outputs(q, k, v):
            options = {"mask": jnp.asarray(end), "scale": SCALE, "softcap": 2.0, "return_lse": True}
            return attention(q, k, v, **options, implementation="pallas_mosaic_gpu")

        (o, lse), pull = jax.vjp(outputs, q, k, v)
        gradients = pull((do, jnp.where(jnp.isfinite(lse), dlse, 0.0)))
    assert not gpu_races()
    np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)
    assert not np.asarray(o[0, 230:], np.float32).any()
    # bfloat16 holds weights, outputs and gradients to a relative 2**-9.
    for got, expected in zip((o, *gradients), (wanted_o, *wanted), strict=True):
        distance = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert distance < 5e-3 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_windows_and_placed_queries_without_races():
    """The same row under a window, its second tile of queries at hand and not its first; with the wider heads that take
    another road where registers are short."""
    q, k, v, do, _ = draw(1, 1, 128)
    end = np.pad(tree_ends([100, 60, 70], [-1, 0, 0]), (0, T - 230))[None]
    held = np.arange(T) >= 128
    do = jnp.where(held[None, :, None, None], do, 0)
    exact = [np.asarray(x, np.float64) for x in (q, k, v, do)]
    o, _, wanted = attend(*exact[:3], [sees(end[0], 50)], SCALE, exact[3])
    wanted = (o[:, held], wanted[0][:, held], *wanted[1:])

    mask = tile(jnp.asarray(end), window=50, block_q=128, block_k=128, place_BI=jnp.array([[1]], jnp.int32))
    q, do = q[:, held], do[:, held]
    with interpreted(H100, gpu_memories()):
        o, lse = pallas_mosaic_gpu.forward(q, k, v, mask, SCALE, None)
        zeros = jnp.zeros_like(lse)
        gradients = pallas_mosaic_gpu.backward(q, k, v, mask, SCALE, None, lse, do, delta(o, do, zeros))
    assert not gpu_races()
    for got, expected in zip((o, *gradients), wanted, strict=True):
        distance = np.linalg.norm(np.asarray(got, np.float64) - expected)
        assert distance < 5e-3 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_detector_finds_a_missing_barrier():
    """The copying warpgroup overwrites a slot of the ring without waiting until it is free."""
    command = [sys.executable, "-m", "tests.kernels.planted_race"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (30.0, None), (None, 300)])
def test_it_lowers_for_cuda(softcap, window):
    """Forward and both backward kernels, in the program that a GPU would compile."""
    options = {"softcap": softcap, "window": window}
    with interpreted(H100, None):

        def loss(q, k, v, end):
            return jnp.sum(attention(q, k, v, mask=end, scale=SCALE, **options).astype(jnp.float32))

        q, k = (jax.ShapeDtypeStruct((1, 1000, n, 128), jnp.bfloat16) for n in (4, 2))
        end = jax.ShapeDtypeStruct((1, 1000), jnp.int32)
        assert why(q, mask=end, **options) == "pallas_mosaic_gpu: it reads active tiles only, on a Hopper GPU"
        text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, end).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
