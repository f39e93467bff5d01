"""What a training run carries from step to step, and how it is born sharded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jorch.model.transformer import Params, Trainable
from jorch.sharding import replicated


class TrainState(NamedTuple):
    """A pytree: step i32[] (updates tried so far), trained parameters, optimizer state. Frozen ones are not in it."""

    step: Any
    params: Params
    opt_state: Any


def state_shardings(model: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where every leaf of the state lies: optimizer moments beside their parameters, scalars everywhere."""
    params, everywhere = model.shardings(mesh), replicated(mesh)
    abstract = model.abstract_params()
    by_path = {
        _names(path): (place, shape.shape)
        for (path, place), shape in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(abstract), strict=True
        )
    }

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        # A moment lies in the optimizer's state under the dictionary keys of its parameter.
        names = _names(path)
        suffixes = (names[i:] for i in range(len(names)))
        place, shape = next((by_path[s] for s in suffixes if s in by_path), (everywhere, None))
        return place if leaf.shape == shape else everywhere

    opt_state = jax.tree_util.tree_map_with_path(of, jax.eval_shape(optimizer.init, abstract))
    return TrainState(step=everywhere, params=params, opt_state=opt_state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def init_state(model: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh, params: Params) -> TrainState:
    """The state of step 0 around given (already sharded) parameters, which are copied."""
    shardings = state_shardings(model, optimizer, mesh)

    def init(params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=shardings)(params)


def abstract_state(model: Trainable, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    params = model.abstract_params()
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_shardings(model, optimizer, mesh),
    )
