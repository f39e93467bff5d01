"""LoRA (Hu et al. 2021, arXiv 2106.09685): the adapter is what is trained, its base stays as it was loaded.

The adapter's parameters are {"layers": {"adapter": {target: {"a": f32[L, in..., R], "b": f32[L, R, out...]}}}}.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jorch.model.transformer import Params, Qwen3, Trainable, Transformer, filled
from jorch.sections import LoraConfig


class LoraQwen3(Trainable):
    """Handle of an adapter of `base`; `frozen` are the base's parameters wherever they are asked for."""

    def __init__(self, base: Qwen3, lora: LoraConfig) -> None:
        self.config, self.lora, self._base = base.config, lora, base
        abstract = nnx.eval_shape(lambda: Transformer(self.config, lora, rngs=nnx.Rngs(params=0)))
        self._graphdef, self._state, self._frozen_state = nnx.split(abstract, nnx.LoRAParam, ...)

    def bind(self, params: Params, frozen: Params | None = None) -> Transformer:
        assert frozen is not None, "an adapter needs its base"
        return nnx.merge(self._graphdef, filled(self._state, params), filled(self._frozen_state, frozen))

    def merge(self, params: Params, frozen: Params | None = None) -> Params:
        """The base with the adapter's products added, in the base's dtype; what has no adapter is not copied."""
        assert frozen is not None, "an adapter needs its base"
        adapter = params["layers"]["adapter"]
        matrices = {name: frozen["layers"][name] for name in adapter}
        places = tuple((name, matrix.sharding) for name, matrix in matrices.items())
        merged = _add_products(matrices, adapter, self.lora.alpha / self.lora.rank, places)
        return frozen | {"layers": frozen["layers"] | merged}

    def init(self, key: jax.Array, mesh: Mesh) -> Params:
        """A of normal numbers, B of zeros: the base's own function."""

        @partial(jax.jit, out_shardings=self.shardings(mesh))
        def init(key: jax.Array) -> Params:
            module = Transformer(self.config, self.lora, rngs=nnx.Rngs(params=key))
            return nnx.to_pure_dict(nnx.state(module, nnx.LoRAParam))

        return init(key)


@partial(jax.jit, static_argnums=(2, 3))
def _add_products(
    matrices: Params, adapter: Params, scale: float, places: tuple[tuple[str, jax.sharding.Sharding], ...]
) -> Params:
    def of_layer(layer: tuple[Params, Params]) -> Params:
        matrices, adapter = layer
        products = {n: jnp.tensordot(pair["a"], pair["b"], 1, precision="highest") for n, pair in adapter.items()}
        return {name: (w + scale * products[name]).astype(w.dtype) for name, w in matrices.items()}

    # One layer after the other: the float32 products of all of them can be larger than the model.
    merged = jax.lax.map(of_layer, (matrices, adapter))
    return {name: jax.lax.with_sharding_constraint(merged[name], place) for name, place in places}


class Start(NamedTuple):
    """Where training begins."""

    model: Trainable
    params: Params
    """What is trained."""
    frozen: Params | None
    """The base of an adapter; None where the whole model is trained."""


def start(base: Qwen3, params: Params, lora: LoraConfig | None, seed: int, mesh: Mesh) -> Start:
    """Training of a model with these parameters: of all of them, or of a new adapter."""
    if lora is None:
        return Start(base, params, None)
    model = LoraQwen3(base, lora)
    return Start(model, model.init(jax.random.key(seed), mesh), params)
