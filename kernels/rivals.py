"""Other people's attention that the benchmark sets beside ours, or why one is left out.

Each is a function (q, k, v) -> o under one of the benchmark's masks, in the form that its library serves best.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.reference import visible
from kernels.compat import target
from kernels.shapes import Shapes

Function = Callable[..., jax.Array]
DIRECTIONS = ("forward", "backward", "both")

DENSE_BYTES = 64e9
"""Paths that hold everything at once are left out where they would need more."""


class Path(NamedTuple):
    """A way to compute attention, and what of it is measured."""

    function: Function  # (q, k, v) -> o
    dtype: str
    directions: tuple[str, ...] = DIRECTIONS


def rivals(case: str, end_T: jax.Array, shapes: Shapes) -> dict[str, Path | str]:
    """By the name that the table shows: a path, or the reason why there is none here."""
    makers = {
        "jax.nn, dense mask": dense,
        "jax's splash": splash,
        "jax's mosaic": stock_mosaic,
        "tokamax, mosaic": partial(tokamax, "mosaic_gpu"),
        "tokamax, triton": partial(tokamax, "triton"),
    }
    return {name: make(case, end_T, shapes) for name, make in makers.items()}


def dense(case: str, end_T: jax.Array, shapes: Shapes) -> Path | str:
    """`jax.nn` with a mask of every pair."""
    num_bytes = 8 * shapes.N * len(end_T) ** 2
    if num_bytes >= DENSE_BYTES:
        return f"its scores would take {num_bytes / 1e9:,.0f} GB"
    seen, scale = jax.jit(visible)(end_T[None])[:, None], shapes.H**-0.5
    return Path(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale), shapes.dtype)


def splash(case: str, end_T: jax.Array, shapes: Shapes) -> Path | str:
    """jax's own kernel for TPUs: it skips what causality hides, and masks other segments without skipping them."""
    if target().backend != "tpu":
        return f"it needs a TPU and the backend is {target().backend}"
    if case not in ("causal", "packed"):
        return "it serves segments, not trees"
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    num_tokens = len(end_T)
    mask = splash_attention_mask.CausalMask((num_tokens, num_tokens))
    heads = splash_attention_mask.MultiHeadMask([mask] * shapes.N)
    block = min(512, num_tokens)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block))
    kernel: Any = splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    segments = splash_attention_kernel.SegmentIds(end_T, end_T)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x[0].swapaxes(0, 1) for x in (q * shapes.H**-0.5, k, v))
        return kernel(q, k, v, segment_ids=segments).swapaxes(0, 1)[None]

    return Path(attend, shapes.dtype)


def stock_mosaic(case: str, end_T: jax.Array, shapes: Shapes) -> Path | str:
    """jax's own kernel for Hopper GPUs: whole causal rows, of which it has no gradient, and scratch of float16 only."""
    if target().backend != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {target().backend}"
    if case != "causal":
        return "it serves whole causal rows"
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    kernel: Any = attention_mgpu.attention
    return Path(lambda q, k, v: kernel(q * shapes.H**-0.5, k, v, config), "float16", ("forward",))


def tokamax(implementation: str, case: str, end_T: jax.Array, shapes: Shapes) -> Path | str:
    """tokamax's kernels: causal rows, segments by where each query's keys begin, trees by a dense mask."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed (extra tokamax, Python 3.12)"
    if target().backend != "gpu":
        return f"it needs an NVIDIA GPU and the backend is {target().backend}"
    if case not in ("causal", "packed") and len(end_T) ** 2 >= DENSE_BYTES / shapes.N:
        return f"it would need a dense mask of {len(end_T) ** 2 / 1e9:,.0f} GB"
    return tokamax_path(implementation, case, end_T, shapes)


def tokamax_path(implementation: str, case: str, end_T: jax.Array, shapes: Shapes) -> Path:
    """One of tokamax's implementations, whether or not this device suits it; its public function takes no segments."""
    from tokamax._src.ops.attention import api, base

    if case == "causal":
        mask = base.Mask(is_causal=True)
    elif case == "packed":
        # A segment's keys begin where the one before it ends, and all of a segment's tokens have its `end`.
        starts_T = jnp.searchsorted(end_T, end_T, side="left").astype(jnp.int32)
        mask = base.Mask(is_causal=True, k_start=starts_T[None, None])
    else:
        mask = base.Mask(jax.jit(visible)(end_T[None])[:, None])
    kernel: Any = api.IMPLEMENTATIONS[implementation]
    return Path(lambda q, k, v: kernel(q, k, v, mask=mask, logits_scale=shapes.H**-0.5), shapes.dtype)
