"""Whether a path computes on the device at hand what the reference computes: what `auto` wants to know of a kernel.

Nothing is asked of the caller: the trial draws its own rows, once a process for each kind of request.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from kernels.attention.gradient import delta
from kernels.attention.mask import tree_ends
from kernels.attention.reference import attention_with_lse, visible
from kernels.attention.tiles import tile

MOST_ERROR = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
"""Relative L2 distance from float32 arithmetic that roundings of the dtype explain."""

_N, _K = 4, 2


class Form(NamedTuple):
    """What of a tiled mask makes another kernel."""

    block_q: int
    block_k: int
    window: bool = False
    placed: bool = False
    """Not all queries of a row are at hand, or not in order."""


@functools.cache
def fault(path: Any, head_dim: int, dtype: str, softcap: float | None, form: Form) -> str | None:
    """What is wrong with a path's outputs or gradients here, or how it failed; None where all is well.

    Args:
        path: a module with `forward` and `backward` over tiles.
    """
    # Traces and meshes belong to threads: in one of its own, the trial runs while its caller is being traced.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_fault, path, head_dim, dtype, softcap, form).result()


def _fault(path: Any, head_dim: int, dtype: str, softcap: float | None, form: Form) -> str | None:
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("all",), axis_types=(AxisType.Auto,))
    block_q, block_k = form.block_q, form.block_k
    # Devices share rows of whole tiles; other rows need not divide into them.
    T = 3 * max(block_q, block_k) if form.placed else 2 * max(block_q, block_k) + 40
    window = T // 4 if form.window else None
    place = jnp.array([[T // block_q - 1, 0]], jnp.int32) if form.placed else None
    at = jnp.arange(T) if place is None else (place[0, :, None] * block_q + jnp.arange(block_q)).ravel()
    prompt = T // 3
    end = jnp.asarray(tree_ends([prompt, prompt, T - 2 * prompt - 30, 30], [-1, 0, 0, -1])[None]).at[:, -10:].set(0)
    rng = np.random.default_rng(0)
    of_queries, of_keys = (len(at), _N), (T, _K)
    shapes = (of_queries, of_keys, of_keys, of_queries)
    drawn = [jnp.asarray(rng.standard_normal((1, *shape, head_dim)), dtype) for shape in shapes]
    scale = head_dim**-0.5

    def tried(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        mask = tile(end, window=window, block_q=block_q, block_k=block_k, place_BI=place)
        o, lse = path.forward(q, k, v, mask, scale, softcap)
        return o, *path.backward(q, k, v, mask, scale, softcap, lse, do, delta(o, do, jnp.zeros_like(lse)))

    def exact(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            seen = visible(end, window)[:, at]
            return attention_with_lse(q, k.swapaxes(1, 2), v.swapaxes(1, 2), seen, scale, softcap)[0]

        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    with jax.set_mesh(mesh):
        try:
            got = jax.device_get(jax.jit(tried)(*drawn))
        except Exception as error:  # a compiler or a device that never saw the kernel: whatever it raises
            return f"it fails here: {(str(error) or type(error).__name__).splitlines()[0]}"
        with jax.default_matmul_precision("highest"):
            wanted = jax.device_get(jax.jit(exact)(*(x.astype(jnp.float32) for x in drawn)))
    error = max(map(distance, got, wanted))
    return None if error < MOST_ERROR[dtype] else f"it is off by {error:.1e} here, more than {MOST_ERROR[dtype]}"


def distance(x: Any, y: Any) -> float:
    """The relative L2 distance of `x` from `y`; NaN counts as infinity."""
    found = float(np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y))
    return float("inf") if np.isnan(found) else found
