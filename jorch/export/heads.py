"""The same model with wider heads: vLLM's attention on CPUs takes head dims that are multiples of 32 only."""

from typing import Any

import jax.numpy as jnp

from jorch.config import ModelConfig
from jorch.model.transformer import Params

WIDTH = 32


def widen(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Pad every head with zeros to a multiple of `WIDTH`; unchanged where it is one.

    The function that the model computes stays, up to rounding and the norms' epsilon. Zeros halve the mean square that
    QK-norm divides by (if H doubles), which its scale makes good; the query's scale also makes good the wider head's
    softmax scale. Rotary pairs (i, i + H/2) keep their angles: with H' = cH, theta' = theta^c.
    """
    H = config.head_dim
    wide = -(-H // WIDTH) * WIDTH
    if wide == H:
        return config, params
    ratio = wide / H
    layers = params["layers"]
    padded: dict[str, Any] = {
        **layers,
        **{name: _pad(layers[name], wide, -1) for name in ("q", "k", "v")},
        "o": _pad(layers["o"], wide, -2),
        # 1/sqrt(ratio) for the mean square, sqrt(ratio) for the softmax scale: the query's cancel.
        "q_norm": _pad(layers["q_norm"], wide, -1),
        "k_norm": _pad(layers["k_norm"], wide, -1) / ratio**0.5,
    }
    changes = {"head_dim": wide, "rope_theta": config.rope_theta**ratio}
    return config.model_copy(update=changes), params | {"layers": padded}


def _pad(x: Any, wide: int, axis: int) -> Any:
    """Zeros behind each half of the head: rotary embeddings pair the halves."""
    first, second = jnp.split(jnp.asarray(x), 2, axis=axis)
    missing = wide // 2 - first.shape[axis]
    widths = [(0, 0)] * first.ndim
    widths[axis] = (0, missing)
    return jnp.concatenate([jnp.pad(first, widths), jnp.pad(second, widths)], axis=axis)
