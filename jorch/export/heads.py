"""The same model with wider heads: vLLM's attention on CPUs takes head dims that are multiples of 32 only."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jorch.export.source import Source
from jorch.model.transformer import Params
from jorch.sections import ModelConfig

WIDTH = 32


def widen(config: ModelConfig, source: Source) -> tuple[ModelConfig, Source]:
    """Pad every head with zeros to a multiple of `WIDTH`; unchanged where it is one. Of a model, or of an adapter.

    The function that the model computes stays, up to rounding and the norms' epsilon. Zeros halve the mean square that
    QK-norm divides by (if H doubles), which its scale makes good; the query's scale also makes good the wider head's
    softmax scale. Rotary pairs (i, i + H/2) keep their angles: with H' = cH, theta' = theta^c.
    """
    H = config.head_dim
    wide = -(-H // WIDTH) * WIDTH
    if wide == H:
        return config, source
    ratio = wide / H
    changes = {"head_dim": wide, "rope_theta": config.rope_theta**ratio}
    return config.model_copy(update=changes), Widened(source, wide, ratio)


class Widened:
    """A source with wider heads."""

    def __init__(self, source: Source, wide: int, ratio: float) -> None:
        self._source, self._wide, self._ratio = source, wide, ratio
        self.by_layer = source.by_layer
        layers = {
            name: jax.eval_shape(lambda x, name=name: self._widened(name, x), stacked)
            for name, stacked in source.shapes["layers"].items()
        }
        self.shapes: Params = source.shapes | {"layers": layers}

    def rows(self, name: str) -> Iterator[jax.Array]:
        return self._source.rows(name)

    def tensor(self, name: str, index: int) -> jax.Array:
        return self._widened(name, self._source.tensor(name, index))

    def _widened(self, name: str, x: jax.Array) -> jax.Array:
        match name:
            case "q" | "k" | "v" | "q_norm" | "adapter/q/b" | "adapter/k/b" | "adapter/v/b":
                return _pad(x, self._wide, -1)
            case "k_norm":
                # 1/sqrt(ratio) for the mean square, sqrt(ratio) for the softmax scale: the query's cancel.
                return _pad(x, self._wide, -1) / self._ratio**0.5
            case "o" | "adapter/o/a":
                return _pad(x, self._wide, -2)
            case _:
                return x


def _pad(x: jax.Array, wide: int, axis: int) -> jax.Array:
    """Zeros behind each half of the head: rotary embeddings pair the halves."""
    first, second = jnp.split(jnp.asarray(x), 2, axis=axis)
    missing = wide // 2 - first.shape[axis]
    widths = [(0, 0)] * first.ndim
    widths[axis] = (0, missing)
    return jnp.concatenate([jnp.pad(first, widths), jnp.pad(second, widths)], axis=axis)
