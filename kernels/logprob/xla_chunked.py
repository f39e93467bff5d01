"""Log-probabilities chunk by chunk in plain XLA: [tokens, V] never exists whole, in neither pass.

Logits are products of the inputs as they are, summed and kept in float32: with bfloat16 inputs, too, a
log-probability is exact to float32's rounding of the sum, which importance ratios need. The backward pass forms the
logits of a chunk again, and from them the gradient of the chunk.

Rows stay apart and the vocabulary whole in every operation, so that XLA leaves both where they are sharded: maxima
and sums over the vocabulary are all that travels.

Letters: B rows, T positions, C positions of a chunk, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp


def forward(
    hidden_BTD: jax.Array, unembedding_VD: jax.Array, targets_BT: jax.Array, chunk: int, with_entropy: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """f32[B, T] each: log-probabilities, entropies (0 unless asked for), log of the softmax's normalisation."""

    def of_chunk(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        h_BCD, target_BC = args
        logits_BCV = logits(h_BCD, unembedding_VD)
        top_BC = jnp.max(logits_BCV, axis=-1)
        weights_BCV = jnp.exp(logits_BCV - top_BC[..., None])
        total_BC = jnp.sum(weights_BCV, axis=-1)
        normalizer_BC = top_BC + jnp.log(total_BC)
        logprob_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0] - normalizer_BC
        if not with_entropy:
            return logprob_BC, jnp.zeros_like(logprob_BC), normalizer_BC
        # Around the maximum: the terms are small where the weights are large, so that little cancels.
        below_BCV = logits_BCV - top_BC[..., None]
        entropy_BC = jnp.log(total_BC) - jnp.sum(weights_BCV * below_BCV, axis=-1) / total_BC
        return logprob_BC, entropy_BC, normalizer_BC

    T = hidden_BTD.shape[1]
    outputs = jax.lax.map(of_chunk, (_cut(hidden_BTD, chunk), _cut(targets_BT, chunk)))
    logprobs_BT, entropy_BT, normalizer_BT = (_join(x, T) for x in outputs)
    return logprobs_BT, entropy_BT, normalizer_BT


def backward(
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    entropy_BT: jax.Array,
    normalizer_BT: jax.Array,
    dlogprobs_BT: jax.Array,
    dentropy_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of the hidden states and of the unembedding; that of the latter is summed in float32."""

    def of_chunk(dw_VD: jax.Array, args: tuple) -> tuple[jax.Array, jax.Array]:
        h_BCD, target_BC, entropy_BC, normalizer_BC, dlogprob_BC, dentropy_BC = args
        logits_BCV = logits(h_BCD, unembedding_VD)
        log_p_BCV = logits_BCV - normalizer_BC[..., None]
        p_BCV = jnp.exp(log_p_BCV)
        dlogits_BCV = dlogprob_BC[..., None] * (_hits(target_BC, logits_BCV) - p_BCV)
        if dentropy_BC is not None:
            dlogits_BCV -= dentropy_BC[..., None] * p_BCV * (log_p_BCV + entropy_BC[..., None])
        dlogits_BCV = dlogits_BCV.astype(h_BCD.dtype)
        dh_BCD = jnp.einsum("bcv,vd->bcd", dlogits_BCV, unembedding_VD, preferred_element_type=jnp.float32)
        dw_VD += jnp.einsum("bcv,bcd->vd", dlogits_BCV, h_BCD, preferred_element_type=jnp.float32)
        return dw_VD, dh_BCD.astype(h_BCD.dtype)

    T = hidden_BTD.shape[1]
    by_token = (hidden_BTD, targets_BT, entropy_BT, normalizer_BT, dlogprobs_BT, dentropy_BT)
    chunks = jax.tree.map(lambda x: _cut(x, chunk), by_token)
    dw_VD, dh = jax.lax.scan(of_chunk, jnp.zeros(unembedding_VD.shape, jnp.float32), chunks)
    return _join(dh, T), dw_VD.astype(unembedding_VD.dtype)


def logits(hidden: jax.Array, unembedding_VD: jax.Array) -> jax.Array:
    """f32[..., V] from hidden states [..., D] of the unembedding's dtype, products and sums exact to float32.

    Left to themselves, GPUs would round float32 inputs to TF32 and TPUs to bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    return jnp.einsum("...d,vd->...v", hidden, unembedding_VD, precision=precision, preferred_element_type=jnp.float32)


def _hits(target_BC: jax.Array, logits_BCV: jax.Array) -> jax.Array:
    return target_BC[..., None] == jnp.arange(logits_BCV.shape[-1])


def _cut(x_BT: jax.Array, chunk: int) -> jax.Array:
    """[chunks, B, C, ...], padded with zeros to whole chunks; rows stay together, as devices hold them."""
    B, T = x_BT.shape[:2]
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % chunk), *((0, 0) for _ in x_BT.shape[2:])))
    return x_BT.reshape(B, -1, chunk, *x_BT.shape[2:]).swapaxes(0, 1)


def _join(x: jax.Array, num_tokens: int) -> jax.Array:
    """[B, T, ...] from chunks."""
    x_BT = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return x_BT[:, :num_tokens]
