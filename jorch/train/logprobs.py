"""Token log-probabilities of packed rows, the one place where predictions are shifted by one."""

import jax
import jax.numpy as jnp

from jorch.types import PackedBatch
from kernels.logprob.api import CHUNK_TOKENS, linear_logprob

__all__ = ["CHUNK_TOKENS", "token_logprobs"]


def token_logprobs(
    hidden_BTD: jax.Array, unembedding_VD: jax.Array, batch: PackedBatch, *, with_entropy: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability (nats) of every token given its predecessor `parents`, and the entropy it was drawn from.

    Returns:
        logprobs f32[B, T], 0 where a token has no predecessor; entropy f32[B, T] or None. The entropy is only
        computed when asked for.
    """
    predictor_BTD = jnp.take_along_axis(hidden_BTD, jnp.maximum(batch.parents, 0)[..., None], axis=1)
    unembedding_VD = unembedding_VD.astype(hidden_BTD.dtype)
    logprobs_BT, entropy_BT = linear_logprob(predictor_BTD, unembedding_VD, batch.token_ids, with_entropy=with_entropy)
    return jnp.where(batch.parents >= 0, logprobs_BT, 0.0), entropy_BT
