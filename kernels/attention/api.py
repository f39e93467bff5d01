"""Attention over packed rows and rollout trees: one mask, one function, an explicit choice of path."""

from typing import Literal

import jax

from kernels.attention.reference import dense_attention, visible

Implementation = Literal["auto", "reference"]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: jax.Array,
    scale: float,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Grouped-query attention where query q sees key k iff k <= q < mask[k].

    That one int32 per key covers causal rows, packed segments, a prompt shared by several rollouts and padding
    (mask 0: seen by none).

    Args:
        mask: i32[B, S], the end of the range of queries that may see each key; S = T.
        scale: multiplies the scores, usually H ** -0.5.
        implementation: "auto" takes the best path for the device; today every device gets "reference".

    Returns:
        [B, T, N, H]; rows that see nothing are 0.

    Raises:
        ValueError: shapes that do not belong together, or an unknown implementation.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if k_BSKH.shape != (B, T, K, H) or v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"k and v must both be [B={B}, S={T}, K, H={H}]; got {k_BSKH.shape} and {v_BSKH.shape}")
    if N % K:
        raise ValueError(f"query heads N={N} are not a multiple of key-value heads K={K}")
    if mask.shape != (B, T):
        raise ValueError(f"mask must be [B={B}, S={T}]; got {mask.shape}")
    if implementation not in ("auto", "reference"):
        raise ValueError(f"implementation={implementation!r}; allowed: 'auto', 'reference'")
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    return dense_attention(q_BTNH, k_BKSH, v_BKSH, visible(mask), scale)
