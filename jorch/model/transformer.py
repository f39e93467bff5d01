"""The Qwen3 decoder: token ids to hidden states. Layers are stacked `[L, ...]` and scanned.

`Transformer` is the NNX module; `Qwen3` is the host-side handle through which everybody else uses it: parameters are
plain nested dicts of arrays outside, and `bind` makes a module of them inside a jitted function.
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jorch.model import remat
from jorch.model.attention import packed_rows
from jorch.model.layers import Block, param, rms_norm, rope_tables
from jorch.sections import LoraConfig, ModelConfig
from jorch.sharding import sharding
from kernels.logprob.api import logits

Params = dict[str, Any]


class Transformer(nnx.Module):
    """Embedding, L blocks, final norm; the unembedding is applied by whoever needs logits."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.config = config
        self.packed_rows = packed_rows
        self.embed = param(
            rngs, (V, D), ("vocab", "embed"), 0.1 if config.tie_word_embeddings else 1.0, config.param_dtype
        )

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, lora, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = param(rngs, (D,), ("embed",), 0, config.param_dtype)
        if not config.tie_word_embeddings:
            self.unembed = param(rngs, (V, D), ("vocab", "embed"), D**-0.5, config.param_dtype)

    @property
    def unembedding_VD(self) -> jax.Array:
        return (self.embed if self.config.tie_word_embeddings else self.unembed)[...]

    def start(self, token_ids_BT: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Any]:
        """Embedded tokens and the rotary tables of their positions."""
        x_BTD = self.embed[...][token_ids_BT].astype(self.config.compute_dtype)
        return x_BTD, rope_tables(positions_BT, self.config.head_dim, self.config.rope_theta)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final hidden states, in the dtype that logits are products of."""
        return rms_norm(x_BTD, self.final_norm[...], self.config.rms_norm_eps, self.config.output_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32[..., V] from hidden states [..., D]."""
        return logits(hidden, self.unembedding_VD.astype(hidden.dtype))

    def hidden(
        self, token_ids_BT: jax.Array, positions_BT: jax.Array, mask_BT: jax.Array, mesh: Mesh | None = None
    ) -> jax.Array:
        """Final hidden states [B, T, D] of packed rows; `mask` as in `kernels.attention.mask`.

        On a `mesh` with a context axis devices share the rows, whose length must split (`config.CONTEXT_TOKENS`).
        """
        rows = self.packed_rows(mask_BT, self.config.head_dim, mesh)
        x_BTD, rope = self.start(rows.spread(token_ids_BT), rows.spread(positions_BT))
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_BTD: jax.Array, state: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, state)(remat.named_input(x_BTD), rope, rows.attend), None

        x_BTD, _ = jax.lax.scan(remat.rematerialised(layer, self.config.remat), x_BTD, stacked)
        return rows.restore(self.finish(x_BTD))


class Trainable(ABC):
    """Host-side handle of what a train step updates: all parameters of a model, or an adapter of frozen ones."""

    config: ModelConfig
    _state: Any
    """Abstract NNX state of the trained parameters."""

    @abstractmethod
    def bind(self, params: Params, frozen: Params | None = None) -> Transformer:
        """The module with these trained and `frozen` parameters; call it inside a traced function."""

    @abstractmethod
    def merge(self, params: Params, frozen: Params | None = None) -> Params:
        """The whole model as `Qwen3` knows it: what samplers and exports take."""

    def abstract_params(self) -> Params:
        """Shapes and dtypes of every trained parameter, without allocating any."""
        return nnx.to_pure_dict(self._state)

    def axes(self) -> Params:
        """Logical axes of every trained parameter, in the structure of `abstract_params`."""
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731

        def of(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
            stacked = ("layers",) if path[0].key == "layers" else ()
            return (*stacked, *variable.get_metadata("axes"))

        tree = jax.tree_util.tree_map_with_path(of, self._state, is_leaf=is_variable)
        return nnx.to_pure_dict(tree)

    def shardings(self, mesh: Mesh) -> Params:
        """Where each trained parameter lies on `mesh`. Raises ValueError where a size does not divide."""
        return jax.tree.map(lambda array, axes: sharding(mesh, array.shape, axes), self.abstract_params(), self.axes())

    def num_params(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.abstract_params()))


class Qwen3(Trainable):
    """Host-side handle of a whole model: initialisation, shardings, and binding of parameters."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(params=0)))
        self._graphdef, self._state = nnx.split(abstract)
        self._block_graphdef, self._block_state = nnx.split(abstract.layers)

    def bind(self, params: Params, frozen: Params | None = None) -> Transformer:
        assert frozen is None, "a whole model is trained whole"
        return nnx.merge(self._graphdef, filled(self._state, params))

    def merge(self, params: Params, frozen: Params | None = None) -> Params:
        return params

    def unstack(self, params: Params) -> Params:
        """The parameters as decoding takes them: in the dtypes of use, "layers" a list with one dict a layer.

        Decoding unrolls the layers, and slices of stacked weights would be copied for every token.
        """
        config = self.config
        stacked = jax.tree.map(lambda x: x.astype(config.compute_dtype), params["layers"])
        layers = [jax.tree.map(lambda x: x[i], stacked) for i in range(config.num_hidden_layers)]  # noqa: B023
        outer = {name: x.astype(config.output_dtype) for name, x in params.items() if name != "layers"}
        return outer | {"layers": layers}

    def bind_unstacked(self, params: Params) -> tuple[Transformer, list[Block]]:
        """The module, its own layers unbound, and the layers of `unstack`ed parameters; for a traced function."""

        def block(layer: Params) -> Block:
            return nnx.merge(self._block_graphdef, filled(self._block_state, layer))

        module = self.bind({name: value for name, value in params.items() if name != "layers"})
        return module, [block(layer) for layer in params["layers"]]

    def init(self, key: jax.Array, mesh: Mesh) -> Params:
        """Random parameters, born sharded: no device ever holds more than its part."""

        @partial(jax.jit, out_shardings=self.shardings(mesh))
        def init(key: jax.Array) -> Params:
            module = Transformer(self.config, rngs=nnx.Rngs(params=key))
            return nnx.to_pure_dict(nnx.state(module))

        return init(key)


def filled(abstract: Any, params: Params) -> Any:
    """NNX state `abstract` with these values."""
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, params)
    return state
