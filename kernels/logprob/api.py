"""Token log-probabilities straight from hidden states, without ever holding [tokens, V]."""

from functools import partial
from typing import Any

import jax

from kernels.logprob import xla_chunked
from kernels.logprob.xla_chunked import logits

__all__ = ["CHUNK_TOKENS", "linear_logprob", "logits"]

CHUNK_TOKENS = 2048


def linear_logprob(
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    with_entropy: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probability of each target under softmax(hidden @ unembedding.T); differentiable in both.

    Logits are float32 whatever the inputs are, and exist for `chunk_tokens` tokens at a time, in both passes. A
    vocabulary that is sharded over devices stays sharded.

    Args:
        hidden_BTD: float32, bfloat16 or float16, and the unembedding has its dtype.
        targets_BT: ints in [0, V).
        with_entropy: also the entropy of each distribution; nothing of it is computed otherwise.
        chunk_tokens: of all rows together.

    Returns:
        f32[B, T] nats, and the entropies f32[B, T] in nats or None.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    _check(hidden_BTD, unembedding_VD, targets_BT, chunk_tokens)
    B, T, _ = hidden_BTD.shape
    chunk = min(T, max(1, chunk_tokens // B))
    outputs: Any = _linear_logprob(hidden_BTD, unembedding_VD, targets_BT, chunk, with_entropy)
    logprobs_BT, entropy_BT = outputs
    return logprobs_BT, entropy_BT if with_entropy else None


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear_logprob(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk: int, with_entropy: bool
) -> tuple[jax.Array, jax.Array]:
    logprobs, entropy, _ = xla_chunked.forward(hidden, unembedding, targets, chunk, with_entropy)
    return logprobs, entropy


def _forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk: int, with_entropy: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    logprobs, entropy, normalizer = xla_chunked.forward(hidden, unembedding, targets, chunk, with_entropy)
    return (logprobs, entropy), (hidden, unembedding, targets, entropy, normalizer)


def _backward(chunk: int, with_entropy: bool, saved: tuple, gradients: tuple) -> tuple:
    hidden, unembedding, targets, entropy, normalizer = saved
    dlogprobs, dentropy = gradients
    dhidden, dunembedding = xla_chunked.backward(
        hidden, unembedding, targets, chunk, entropy, normalizer, dlogprobs, dentropy if with_entropy else None
    )
    return dhidden, dunembedding, None


_linear_logprob.defvjp(_forward, _backward)


def _check(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunk_tokens: int) -> None:
    B, T, D = hidden.shape
    if unembedding.ndim != 2 or unembedding.shape[1] != D:
        raise ValueError(f"unembedding must be [V, D={D}] as hidden is [B={B}, T={T}, D={D}]; got {unembedding.shape}")
    if targets.shape != (B, T):
        raise ValueError(f"targets must be [B={B}, T={T}]; got {targets.shape}")
    if str(hidden.dtype) not in ("float32", "bfloat16", "float16") or unembedding.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and unembedding must share one dtype of float32, bfloat16, float16; got {hidden.dtype} and "
            f"{unembedding.dtype}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}; allowed: at least 1")
