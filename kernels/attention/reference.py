"""Readable XLA attention: the semantics that every fast path must reproduce.

Letters: B rows, T query and S key positions, N query heads, K key-value heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp


def visible(end_BS: jax.Array, window: int | None = None) -> jax.Array:
    """The dense form of the mask, bool[B, T, S]: query q sees key k iff k <= q < end[k].

    Under a window it sees the last `window` of them only, itself included, counted along its own path.
    """
    position = jnp.arange(end_BS.shape[1], dtype=jnp.int32)
    q_T1, k_1S = position[:, None], position[None, :]
    seen_BTS = (k_1S <= q_T1) & (q_T1 < end_BS[:, None, :])
    if window is not None:
        depth_BS = depths(end_BS)
        seen_BTS &= depth_BS[:, :, None] - depth_BS[:, None, :] < window
    return seen_BTS


def depths(end_BS: jax.Array) -> jax.Array:
    """i32[B, S]: how many keys a token sees before itself, which is its position in its own sequence.

    A key leaves sight at its end; so the sight of query q is q + 1 less the keys that have left by then.
    """
    B, S = end_BS.shape
    position = jnp.arange(S, dtype=jnp.int32)
    leaves_BS = jnp.clip(end_BS, position, S)
    leaving_BS = jnp.zeros((B, S + 1), jnp.int32).at[jnp.arange(B)[:, None], leaves_BS].add(1)[:, :S]
    return position - jnp.cumsum(leaving_BS, axis=1)


def attention_with_lse(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention under any dense mask; softmax in float32.

    Keys and values come heads first, as the KV cache keeps them.

    Returns:
        Outputs [B, T, N, H], 0 for a query that sees nothing, and log(sum(exp(scores))), f32[B, T, N], -inf there.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    # One batched matmul per key-value head: its G query heads are stacked along the query axis.
    q_BKQH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    allowed = jnp.tile(visible_BTS, (1, G, 1))[:, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    # A finite maximum keeps exp(-inf - max) at 0 instead of NaN where a query sees nothing.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    blind = total == 0
    total = jnp.where(blind, 1.0, total)
    o_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    o_BKQH = (o_BKQH / total).astype(v_BKSH.dtype)
    lse_BKQ = jnp.where(blind, -jnp.inf, top + jnp.log(total))[..., 0]
    o_BTNH = o_BKQH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return o_BTNH, lse_BKQ.reshape(B, K, G, T).transpose(0, 3, 1, 2).reshape(B, T, N)


def dense_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array, scale: float
) -> jax.Array:
    """The outputs of `attention_with_lse`, [B, T, N, H]."""
    return attention_with_lse(q_BTNH, k_BKSH, v_BKSH, visible_BTS, scale)[0]
