"""How far trainer and sampler disagree about the trained tokens: log(trainer / sampler) as counts, then as quantiles.

Counts add up over micro-batches and devices, as every metric of `losses.py` must; quantiles do not.
"""

import jax
import jax.numpy as jnp
import numpy as np

COUNTS = "log_ratio_counts"
"""Among the metrics of a train step; the loop makes quantiles of it."""

QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}

_BINS_PER_DECADE = 16
_MAGNITUDES = 10.0 ** (np.arange(-6 * _BINS_PER_DECADE, 2 * _BINS_PER_DECADE + 1) / _BINS_PER_DECADE)
_EDGES = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES])
_MIDDLES = np.sqrt(_MAGNITUDES[1:] * _MAGNITUDES[:-1])
VALUES = np.concatenate([-_MAGNITUDES[-1:], -_MIDDLES[::-1], [0.0], _MIDDLES, _MAGNITUDES[-1:]])
"""What each count stands for, nats: within 8 % of the log ratio from 1e-6 to 100, below that 0, beyond that 100."""


def count(log_ratio_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """Sum of the weights of the tokens in each bin, f32[len(VALUES)]. NaN counts as the largest."""
    bins_BT = jnp.searchsorted(jnp.asarray(_EDGES, jnp.float32), log_ratio_BT)
    return jnp.zeros(len(VALUES), jnp.float32).at[bins_BT].add(weights_BT)


def quantiles(counts: np.ndarray | float) -> dict[str, float]:
    """Metrics by name, nats; none where nothing was counted."""
    below = np.cumsum(counts)
    if below[-1] <= 0:
        return {}
    found = {name: VALUES[np.searchsorted(below, share * below[-1])] for name, share in QUANTILES.items()}
    return {f"policy/log_ratio_{name}_nats": float(value) for name, value in found.items()}
