"""Attention of appended tokens over slotted caches, with a prefix that siblings share read once.

Letters: B rows, P prompts, R = B / P sibling rows of a prompt, O appended tokens, S columns of a row's own cache, C
columns of the prompts' cache, N query heads, K key-value heads, H head dim. Caches are as the sampler keeps them: keys
[.., K, H, columns], values [.., K, columns, H].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.reference import attention_with_lse


class Seats(NamedTuple):
    """Which rows share a prompt: each of P prompts has R seats, some of which may be empty."""

    row_PR: Any  # i32, the row in each seat; any row in an empty one
    seat_B: Any  # i32, each row's seat, of all P x R


def decode_attention(
    q_BONH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    visible_BOS: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over each row's own cache.

    Args:
        visible_BOS: bool, which columns each appended token sees.
        scale: multiplies the scores, usually H ** -0.5.

    Returns:
        Outputs [B, O, N, H] and log-sum-exp f32[B, O, N]; 0 and -inf for a token that sees nothing.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(q_BONH, k_BKHS, v_BKSH, "the rows' cache", len(q_BONH))
    B, O = q_BONH.shape[:2]  # noqa: E741
    S = v_BKSH.shape[2]
    if visible_BOS.shape != (B, O, S):
        raise ValueError(f"visible must be [B={B}, O={O}, S={S}]; got {visible_BOS.shape}")
    return attention_with_lse(q_BONH, k_BKHS.swapaxes(2, 3), v_BKSH, visible_BOS, scale)


def cascade_attention(
    q_BONH: jax.Array,
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    visible_BOS: jax.Array,
    k_PKHC: jax.Array,
    v_PKCH: jax.Array,
    prompt_tokens_P: jax.Array,
    seats: Seats | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention over a prompt that R siblings share, and over what each row has appended since.

    The queries of siblings are stacked, so that a prompt's keys and values are read once for all of them; the two parts
    are then merged by their log-sum-exps, which is exact.

    Args:
        q_BONH: rows B, with `seats` in any order; without them B = P x R, the siblings of a prompt one after the other.
        visible_BOS: bool, which columns of its own cache each appended token sees.
        prompt_tokens_P: i32, how many of the C columns each prompt fills, from the first on; all its rows see them.
        scale: multiplies the scores, usually H ** -0.5.

    Returns:
        As `decode_attention`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    P, C = v_PKCH.shape[0], v_PKCH.shape[2]
    B, O, N, H = q_BONH.shape  # noqa: E741
    if seats is None:
        if B % P:
            raise ValueError(f"rows B={B} are not a multiple of prompts P={P}")
        seats = Seats(jnp.arange(B).reshape(P, -1), jnp.arange(B))
    if seats.row_PR.shape[0] != P or seats.seat_B.shape != (B,):
        raise ValueError(f"seats must be [P={P}, R] and [B={B}]; got {seats.row_PR.shape} and {seats.seat_B.shape}")
    if prompt_tokens_P.shape != (P,):
        raise ValueError(f"prompt_tokens must be [P={P}]; got {prompt_tokens_P.shape}")
    _check(q_BONH, k_PKHC, v_PKCH, "the prompts' cache", P)
    own = decode_attention(q_BONH, k_BKHS, v_BKSH, visible_BOS, scale=scale)
    stacked = q_BONH[seats.row_PR].reshape(P, -1, N, H)
    filled_PQC = jnp.broadcast_to(jnp.arange(C) < prompt_tokens_P[:, None, None], (P, stacked.shape[1], C))
    o, lse = attention_with_lse(stacked, k_PKHC.swapaxes(2, 3), v_PKCH, filled_PQC, scale)
    shared = (o.reshape(-1, O, N, H)[seats.seat_B], lse.reshape(-1, O, N)[seats.seat_B])
    return merge(shared, own)


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(outputs, log-sum-exp) over the union of two disjoint sets of keys, from those over each of them."""
    (o_one, lse_one), (o_other, lse_other) = one, other
    # A finite maximum keeps exp(-inf - max) at 0 instead of NaN where neither sees anything.
    top = jnp.maximum(jnp.maximum(lse_one, lse_other), jnp.finfo(jnp.float32).min)
    w_one, w_other = jnp.exp(lse_one - top), jnp.exp(lse_other - top)
    total = w_one + w_other
    lse = top + jnp.log(total)
    total = jnp.where(total == 0, 1.0, total)
    o = (w_one / total)[..., None] * o_one.astype(jnp.float32) + (w_other / total)[..., None] * o_other.astype(
        jnp.float32
    )
    return o.astype(o_one.dtype), lse


def _check(q: jax.Array, k: jax.Array, v: jax.Array, name: str, num_rows: int) -> None:
    N, H = q.shape[2:]
    _, K, columns, _ = v.shape
    if v.shape != (num_rows, K, columns, H) or k.shape != (num_rows, K, H, columns):
        raise ValueError(
            f"{name} must be k [{num_rows}, K, H={H}, columns] and v [{num_rows}, K, columns, H={H}]; "
            f"got {k.shape} and {v.shape}"
        )
    if N % K:
        raise ValueError(f"query heads N={N} are not a multiple of key-value heads K={K}")
