"""Token log-probabilities of packed rows, the one place where predictions are shifted by one.

Logits are formed chunk by chunk and recomputed in the backward pass, so that [tokens, V] never exists whole.
"""

import jax
import jax.numpy as jnp

from jorch.types import PackedBatch

MAX_CHUNK_TOKENS = 2048


def token_logprobs(
    hidden_BTD: jax.Array, unembedding_VD: jax.Array, batch: PackedBatch, *, with_entropy: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability (nats) of every token given its predecessor `parents`, and the entropy it was drawn from.

    Returns:
        logprobs f32[B, T], 0 where a token has no predecessor; entropy f32[B, T] or None. The entropy is only
        computed when asked for.
    """
    B, T, D = hidden_BTD.shape
    predictor_BTD = jnp.take_along_axis(hidden_BTD, jnp.maximum(batch.parents, 0)[..., None], axis=1)
    chunk = _chunk_tokens(B * T)

    @jax.checkpoint
    def of_chunk(h_CD: jax.Array, target_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_CV = jnp.einsum("cd,vd->cv", h_CD, unembedding_VD.astype(h_CD.dtype), preferred_element_type=jnp.float32)
        normalizer_C = jax.nn.logsumexp(logits_CV, axis=-1)
        logprob_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0] - normalizer_C
        if not with_entropy:
            return logprob_C, jnp.zeros_like(logprob_C)
        p_CV = jnp.exp(logits_CV - normalizer_C[:, None])
        return logprob_C, normalizer_C - jnp.sum(p_CV * logits_CV, axis=-1)

    logprobs, entropy = jax.lax.map(
        lambda args: of_chunk(*args),
        (predictor_BTD.reshape(-1, chunk, D), batch.token_ids.reshape(-1, chunk)),
    )
    logprobs_BT = jnp.where(batch.parents >= 0, logprobs.reshape(B, T), 0.0)
    return logprobs_BT, entropy.reshape(B, T) if with_entropy else None


def _chunk_tokens(num_tokens: int) -> int:
    """The largest divisor of `num_tokens` that is at most MAX_CHUNK_TOKENS."""
    return next(c for c in range(min(num_tokens, MAX_CHUNK_TOKENS), 0, -1) if num_tokens % c == 0)
