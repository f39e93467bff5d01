"""A checkpoint of weights alone: `jorch import` writes it, `init_from` and `jorch export` read it, on any mesh.

    CKPT/architecture        config.json and the tokenizer
    CKPT/params/embed, ...   Orbax; what lies outside of layers
    CKPT/params/layer_0 ...  Orbax; one layer each

Orbax copies what it saves to the host, and cannot hold back a part of an array. So the pieces are saved one by one.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jorch.config import ModelConfig
from jorch.data.tokenizer import Tokenizer
from jorch.export import hf
from jorch.model.transformer import Params, Qwen3

PARAMS = "params"


def is_checkpoint(folder: Path) -> bool:
    return (folder / PARAMS).is_dir() and (folder / hf.ARCHITECTURE).is_dir()


def save(folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Write `folder`, whole or not at all. Raises OSError naming it."""
    with hf.replaced(folder) as written:
        (written / hf.ARCHITECTURE).mkdir()
        hf.write_architecture(written / hf.ARCHITECTURE, config, tokenizer)
        for name, array in params.items():
            if name != "layers":
                ocp.save(_piece(written, name), {name: array})
        for index in range(config.num_hidden_layers):
            ocp.save(_piece(written, f"layer_{index}"), {name: x[index] for name, x in params["layers"].items()})


def _piece(folder: Path, name: str) -> str:
    return str((folder / PARAMS / name).absolute())


def load(folder: Path, model: Qwen3, mesh: Mesh) -> Params:
    """The parameters in the model's dtype and shardings, whatever they were saved in.

    Raises ValueError where they cannot be read.
    """
    abstract, shardings = model.abstract_params(), model.shardings(mesh)
    stacked, places = abstract["layers"], shardings["layers"]
    layer = {name: _of_layer(x, places[name]) for name, x in stacked.items()}

    @partial(jax.jit, donate_argnums=0, out_shardings=places)
    def insert(stacks: Params, layer: Params, index: jax.Array) -> Params:
        return jax.tree.map(lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, index, 0), stacks, layer)

    params: Params = {}
    for name, x in abstract.items():
        if name != "layers":
            params |= _load_piece(
                folder, name, {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])}
            )
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stacked), out_shardings=places)
    params["layers"] = zeros()
    for index in range(model.config.num_hidden_layers):
        piece = _load_piece(folder, f"layer_{index}", layer)
        # Without waiting, the host would read ahead of the devices and hold what they have not taken yet.
        params["layers"] = jax.block_until_ready(insert(params["layers"], piece, jnp.int32(index)))
    return params


def _of_layer(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """One layer of a stacked parameter."""
    return jax.ShapeDtypeStruct(
        x.shape[1:], x.dtype, sharding=NamedSharding(place.mesh, PartitionSpec(*tuple(place.spec)[1:]))
    )


def _load_piece(folder: Path, name: str, abstract: Params) -> Any:
    try:
        return ocp.load(_piece(folder, name), abstract)
    except Exception as error:  # Orbax and tensorstore raise whatever they like for a damaged folder
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder / PARAMS / name} cannot be read ({reason}); import the model again") from error
