"""A checkpoint of weights alone: `jorch import` writes it, `init_from` and `jorch export` read it, on any mesh.

    CKPT/architecture         config.json and the tokenizer
    CKPT/params/embed_0, ...  Orbax; what lies outside of layers, in blocks of rows
    CKPT/params/layer_0, ...  Orbax; one layer each

Orbax copies what it saves to the host, and cannot hold back a part of an array. So the pieces are saved one by one.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jorch.data.tokenizer import Tokenizer
from jorch.export import hf
from jorch.export.source import Held, row_blocks
from jorch.model.transformer import Params, Qwen3
from jorch.sections import ModelConfig

PARAMS = "params"


def is_checkpoint(folder: Path) -> bool:
    return (folder / PARAMS).is_dir() and (folder / hf.ARCHITECTURE).is_dir()


def save(folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Write `folder`, whole or not at all. Raises OSError naming it."""
    with hf.replaced(folder) as written:
        (written / hf.ARCHITECTURE).mkdir()
        hf.write_architecture(written / hf.ARCHITECTURE, config, tokenizer)
        held = Held(params)
        for name in params.keys() - {"layers"}:
            for number, rows in enumerate(held.rows(name)):
                ocp.save(_piece(written, f"{name}_{number}"), {name: rows})
        for index in range(config.num_hidden_layers):
            ocp.save(_piece(written, f"layer_{index}"), {name: x[index] for name, x in params["layers"].items()})


def _piece(folder: Path, name: str) -> str:
    return str((folder / PARAMS / name).absolute())


class Stored:
    """The parameters of such a checkpoint, read when they are asked for: a `Source` that holds one layer at most."""

    by_layer = True

    def __init__(self, folder: Path, model: Qwen3, mesh: Mesh) -> None:
        """They come in the model's dtype and shardings, whatever they were saved in."""
        self.shapes: Params = model.abstract_params()
        self._folder, self._places = folder, model.shardings(mesh)
        self._index, self._layer = -1, {}

    def rows(self, name: str) -> Iterator[jax.Array]:
        """Raises ValueError where they cannot be read."""
        shape, dtype = self.shapes[name].shape, self.shapes[name].dtype
        place = _of_rest(self._places[name], None)
        for number, (begin, end) in enumerate(row_blocks(shape)):
            wanted = jax.ShapeDtypeStruct((end - begin, *shape[1:]), dtype, sharding=place)
            yield _load_piece(self._folder, f"{name}_{number}", {name: wanted})[name]

    def tensor(self, name: str, index: int) -> jax.Array:
        """Raises ValueError where it cannot be read."""
        return self.layer(index)[name]

    def layer(self, index: int) -> Params:
        """Raises ValueError where it cannot be read."""
        if index != self._index:
            self._layer.clear()  # before the next one is read
            stacked, places = self.shapes["layers"], self._places["layers"]
            wanted = {
                name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_of_rest(places[name]))
                for name, x in stacked.items()
            }
            self._index, self._layer = index, _load_piece(self._folder, f"layer_{index}", wanted)
        return self._layer


def load(folder: Path, model: Qwen3, mesh: Mesh) -> Params:
    """All parameters in the model's dtype and shardings, whatever they were saved in.

    Raises ValueError where they cannot be read.
    """
    stored, shardings = Stored(folder, model, mesh), model.shardings(mesh)
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stored.shapes), out_shardings=shardings)
    params = zeros()
    for name in params.keys() - {"layers"}:
        begin = 0
        for rows in stored.rows(name):
            # Without waiting, the host would read ahead of the devices and hold what they have not taken yet.
            params[name] = jax.block_until_ready(_insert(params[name], rows, jnp.int32(begin), shardings[name]))
            begin += rows.shape[0]
    places = shardings["layers"]
    for index in range(model.config.num_hidden_layers):
        for name, tensor in stored.layer(index).items():
            stack = _insert(params["layers"][name], tensor[None], jnp.int32(index), places[name])
            params["layers"][name] = jax.block_until_ready(stack)
    return params


def _insert(whole: jax.Array, part: jax.Array, begin: jax.Array, place: NamedSharding) -> jax.Array:
    """`whole` with `part` in its place along the first axis; `whole` is donated."""
    return _inserter(place)(whole, part, begin)


@cache
def _inserter(place: NamedSharding) -> Any:
    @partial(jax.jit, donate_argnums=0, out_shardings=place)
    def insert(whole: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, begin, axis=0)

    return insert


def _of_rest(place: NamedSharding, *before: None) -> NamedSharding:
    """The sharding of all axes but the first, behind as many unsharded ones as are given."""
    return NamedSharding(place.mesh, PartitionSpec(*before, *tuple(place.spec)[1:]))


def _load_piece(folder: Path, name: str, abstract: Params) -> Any:
    try:
        return ocp.load(_piece(folder, name), abstract)
    except Exception as error:  # Orbax and tensorstore raise whatever they like for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / PARAMS / name} cannot be read ({reason}); import the model again") from error
