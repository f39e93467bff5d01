"""Readable XLA attention: the semantics that every fast path must reproduce.

Letters: B rows, T query and S key positions, N query heads, K key-value heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp


def visible(mask_BS: jax.Array) -> jax.Array:
    """The dense form of the mask, bool[B, T, S]: query q sees key k iff k <= q < mask[k]."""
    position = jnp.arange(mask_BS.shape[1], dtype=jnp.int32)
    q_T1, k_1S = position[:, None], position[None, :]
    return (k_1S <= q_T1) & (q_T1 < mask_BS[:, None, :])


def dense_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array, scale: float
) -> jax.Array:
    """Grouped-query attention under any dense mask; softmax in float32.

    Keys and values come heads first, as the KV cache keeps them. A query that sees nothing yields 0.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    G = N // K
    # One batched matmul per key-value head: its G query heads are stacked along the query axis.
    q_BKQH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32) * scale
    allowed = jnp.tile(visible_BTS, (1, G, 1))[:, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    # A finite maximum keeps exp(-inf - max) at 0 instead of NaN where a query sees nothing.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    o_BKQH = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    o_BKQH = (o_BKQH / jnp.where(total == 0, 1.0, total)).astype(v_BKSH.dtype)
    return o_BKQH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
