"""What the backward passes by tiles share."""

import jax
import jax.numpy as jnp


def delta(o_BTNH: jax.Array, do_BTNH: jax.Array, dlse_BTN: jax.Array) -> jax.Array:
    """f32[B, T, N], what the softmax's normalisation takes off: d loss / d score = p * (dp - delta).

    `do` and `dlse` are the gradients of the outputs and of the log-sum-exp (FlashAttention-2, arXiv 2307.08691,
    algorithm 2; with the second one as in ring attention).
    """
    return jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), -1) - dlse_BTN
