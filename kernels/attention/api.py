"""Attention over packed rows and rollout trees: one mask, one function, an explicit choice of path."""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention import cudnn, pallas_mosaic_gpu, pallas_tpu, xla_chunked
from kernels.attention.choice import Implementation, Request, announce, choose, refusal
from kernels.attention.gradient import delta
from kernels.attention.reference import attention_with_lse, visible
from kernels.attention.tiles import TiledMask, tile
from kernels.compat import target
from kernels.tuning import blocks

SAVED_NAME = "attention"
"""What `jax.checkpoint` policies call the outputs that the backward pass needs: where they are saved, attention is not
computed again."""

Mask = jax.Array | TiledMask | Literal["causal"]

BY_TILES: dict[str, Any] = {
    "xla_chunked": xla_chunked,
    "pallas_tpu": pallas_tpu,
    "pallas_mosaic_gpu": pallas_mosaic_gpu,
}
"""Paths with a `forward` and a `backward` over a TiledMask."""


@overload
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
    return_lse: Literal[False] = False,
) -> jax.Array: ...
@overload
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query q sees key k iff k <= q < mask[k]; differentiable in q, k and v.

    Args:
        q_BTNH: float32, bfloat16 or float16; k and v have its dtype, and S = T.
        mask: i32[B, S], `end` of `kernels.attention.mask`; the same after `tiles.tile`, which layers can share; or
            "causal", whole causal rows.
        scale: multiplies the scores, usually H ** -0.5.
        softcap: scores become softcap * tanh(score / softcap).
        window: a token sees at most this many tokens of its own path, itself included.
        implementation: "auto" takes the best path for the device and the request; `why` tells which. "reference" is
            dense, "xla_chunked" goes tile by tile in linear memory, "cudnn" serves plain causal rows on NVIDIA GPUs,
            "pallas_tpu" and "pallas_mosaic_gpu" go tile by tile on TPUs and on Hopper GPUs.
        return_lse: also return log(sum(exp(scores))); it is differentiable.

    Returns:
        [B, T, N, H], or that and f32[B, T, N]. A row that sees nothing has output 0, log-sum-exp -inf and gradient 0.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit, or an implementation that cannot serve the request.
    """
    check(q_BTNH, k_BSKH, v_BSKH, mask, softcap, window)
    window = mask.window if isinstance(mask, TiledMask) else window
    path, reason = choose(implementation, _request(q_BTNH, mask, softcap, window, return_lse))
    announce(path, reason)
    if path == "cudnn":
        return checkpoint_name(cudnn.causal_attention(q_BTNH, k_BSKH, v_BSKH, scale), SAVED_NAME)
    if path == "reference":
        seen_BTS = visible(_ends(mask, q_BTNH), window)
        k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
        both = attention_with_lse(q_BTNH, k_BKSH, v_BKSH, seen_BTS, scale, softcap)
        o_BTNH, lse_BTN = checkpoint_name(both, SAVED_NAME)
    else:
        tiled = mask if isinstance(mask, TiledMask) else tile(_ends(mask, q_BTNH), window=window)
        outputs: Any = _by_tiles(q_BTNH, k_BSKH, v_BSKH, tiled, scale, softcap, path)
        o_BTNH, lse_BTN = outputs
    return (o_BTNH, lse_BTN) if return_lse else o_BTNH


def why(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    *,
    mask: Mask,
    softcap: float | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> str:
    """One line: the path that `attention` takes for these arguments, and the reason.

    Raises:
        ValueError: as `attention`, where no path serves the request.
    """
    path, reason = choose(implementation, _request(q_BTNH, mask, softcap, window, return_lse))
    return f"{path}: {reason}"


def why_not(implementation: Implementation, q_BTNH: jax.Array | jax.ShapeDtypeStruct, mask: Mask) -> str | None:
    """Why an implementation does not serve such queries under such a mask, without softcap; None where it does."""
    window = mask.window if isinstance(mask, TiledMask) else None
    return refusal(implementation, _request(q_BTNH, mask, None, window, False))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _by_tiles(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: TiledMask,
    scale: float,
    softcap: float | None,
    path: str,
) -> tuple[jax.Array, jax.Array]:
    return BY_TILES[path].forward(q_BTNH, k_BSKH, v_BSKH, mask, scale, softcap)


def _by_tiles_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: TiledMask, scale: float, softcap: float | None, path: str
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    o, lse = checkpoint_name(BY_TILES[path].forward(q, k, v, mask, scale, softcap), SAVED_NAME)
    return (o, lse), (q, k, v, mask, o, lse)


def _by_tiles_backward(scale: float, softcap: float | None, path: str, saved: tuple, gradients: tuple) -> tuple:
    q, k, v, mask, o, lse = saved
    do, dlse = gradients
    dq, dk, dv = BY_TILES[path].backward(q, k, v, mask, scale, softcap, lse, do, delta(o, do, dlse))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_by_tiles.defvjp(_by_tiles_forward, _by_tiles_backward)


def _request(
    q: jax.Array | jax.ShapeDtypeStruct, mask: Mask, softcap: float | None, window: int | None, return_lse: bool
) -> Request:
    _, T, _, H = q.shape
    here = target()
    block_q, block_k = (mask.block_q, mask.block_k) if isinstance(mask, TiledMask) else blocks(here, T)[:2]
    causal = isinstance(mask, str)
    return Request(T, H, str(q.dtype), causal, window, softcap, return_lse, block_q, block_k, here)


def _ends(mask: Mask, q_BTNH: jax.Array) -> jax.Array:
    B, T, _, _ = q_BTNH.shape
    if isinstance(mask, str):
        return jnp.full((B, T), T, jnp.int32)
    return mask.end_BS[:, :T] if isinstance(mask, TiledMask) else mask


def check(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, softcap: float | None, window: int | None) -> None:
    """Raises ValueError for arguments that no path of `attention` serves."""
    B, T, N, H = q.shape
    K = k.shape[2]
    if k.shape != (B, T, K, H) or v.shape != k.shape:
        raise ValueError(f"k and v must both be [B={B}, S={T}, K, H={H}]; got {k.shape} and {v.shape}")
    if N % K:
        raise ValueError(f"query heads N={N} are not a multiple of key-value heads K={K}")
    if str(q.dtype) not in ("float32", "bfloat16", "float16") or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one dtype of float32, bfloat16, float16; got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; allowed: None or a number above 0")
    if window is not None and window < 1:
        raise ValueError(f"window={window}; allowed: None or at least 1 token")
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f'mask={mask!r}; allowed: "causal", i32[B={B}, S={T}] or what `tile` made of it')
    elif isinstance(mask, TiledMask):
        if (len(mask.end_BS), mask.num_tokens) != (B, T):
            raise ValueError(f"mask must be [B={B}, S={T}]; it was tiled for {(len(mask.end_BS), mask.num_tokens)}")
        if window not in (None, mask.window):
            raise ValueError(f"window={window}, but the mask was tiled for window={mask.window}; tile it with yours")
    elif mask.shape != (B, T) or not jnp.issubdtype(mask.dtype, jnp.integer):
        raise ValueError(f"mask must be ints [B={B}, S={T}]; got {mask.dtype} {mask.shape}")
