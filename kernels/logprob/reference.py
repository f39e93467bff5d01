"""Readable log-probabilities: the semantics of `kernels.logprob.api`, with all logits in memory at once."""

import jax
import jax.numpy as jnp


def log_probabilities(
    hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, entropy of each distribution), both f32[B, T] in nats."""
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, unembedding_VD, preferred_element_type=jnp.float32)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    target_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_BT, -jnp.sum(jnp.exp(log_p_BTV) * log_p_BTV, axis=-1)
