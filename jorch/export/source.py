"""Where parameters that are exported come from: one layer's tensor, or some rows of an embedding, at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Params
from jorch.stored_arrays import StoredArrays, checksums, names_of

_BLOCK_ELEMENTS = 32 * 2**20
"""Of the embedding, which goes through the host in blocks of rows."""


class Source(Protocol):
    """Parameters of a model, not all of which need to be in memory."""

    shapes: Params
    """Shape and dtype of each, layers stacked, as `Qwen3.abstract_params` has them."""
    by_layer: bool
    """Whether to ask for all tensors of a layer before those of the next."""

    def rows(self, name: str) -> Iterator[jax.Array]:
        """A parameter outside of layers, as its consecutive blocks of rows."""
        ...

    def tensor(self, name: str, index: int) -> jax.Array:
        """One parameter of layer `index`."""
        ...


@dataclass
class Held:
    """Parameters that are in memory anyway."""

    params: Params
    by_layer: bool = False

    def __post_init__(self) -> None:
        self.shapes: Params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.params)

    def rows(self, name: str) -> Iterator[jax.Array]:
        array = self.params[name]
        yield from (array[begin:end] for begin, end in row_blocks(array.shape))

    def tensor(self, name: str, index: int) -> jax.Array:
        return self.params["layers"][name][index]


class Cast:
    """A source whose parameters are in another type, each converted when it is asked for."""

    def __init__(self, source: Source, dtype: str) -> None:
        self._source, self._dtype = source, jnp.dtype(dtype)
        self.by_layer = source.by_layer
        self.shapes: Params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, self._dtype), source.shapes)

    def rows(self, name: str) -> Iterator[jax.Array]:
        yield from (block.astype(self._dtype) for block in self._source.rows(name))

    def tensor(self, name: str, index: int) -> jax.Array:
        return self._source.tensor(name, index).astype(self._dtype)


@dataclass
class OfRun:
    """The parameters in a checkpoint of a run, read when they are asked for and held no longer."""

    arrays: StoredArrays
    shapes: Params
    by_layer: bool = False

    def rows(self, name: str) -> Iterator[jax.Array]:
        """Raises ValueError where they cannot be read."""
        x = self.shapes[name]
        for begin, end in row_blocks(x.shape):
            yield jnp.asarray(self.arrays.rows(f"params/{name}", begin, end, x.shape)).astype(x.dtype)

    def tensor(self, name: str, index: int) -> jax.Array:
        """Raises ValueError where it cannot be read."""
        x = self.shapes["layers"][name]
        [layer] = self.arrays.rows(f"params/layers/{name}", index, index + 1, x.shape)
        return jnp.asarray(layer).astype(x.dtype)


class Merged:
    """A base with the products of an adapter added, one matrix at a time."""

    def __init__(self, base: Source, adapter: Source, model: LoraQwen3) -> None:
        """`adapter` has its layers' parameters by flat names, as `flat_adapter` gives them."""
        self.shapes, self.by_layer = base.shapes, base.by_layer
        self._base, self._adapter, self._model = base, adapter, model

    def rows(self, name: str) -> Iterator[jax.Array]:
        return self._base.rows(name)

    def tensor(self, name: str, index: int) -> jax.Array:
        matrix = self._base.tensor(name, index)
        if name not in self._model.lora.targets:
            return matrix
        # A model of one layer, merged as a whole one is: the same rounding.
        pair = {half: self._adapter.tensor(f"adapter/{name}/{half}", index)[None] for half in ("a", "b")}
        merged = self._model.merge({"layers": {"adapter": {name: pair}}}, {"layers": {name: matrix[None]}})
        return merged["layers"][name][0]


def flat_adapter(params: Params) -> Params:
    """An adapter's parameters with names such as adapter/q/a, so that they are a source's like any others."""
    pairs = params["layers"]["adapter"]
    return {"layers": {f"adapter/{name}/{half}": x for name, pair in pairs.items() for half, x in pair.items()}}


def checksums_of(source: Source) -> dict[str, int]:
    """As `stored_arrays.checksums` of the source's parameters, in its order; they are read one after the other."""
    leaves = jax.tree_util.tree_leaves_with_path(source.shapes)
    sums = dict.fromkeys(("/".join(names_of(path)) for path, _ in leaves), 0)

    def add(name: str, part: jax.Array) -> None:
        sums[name] = (sums[name] + checksums({name: part})[name]) % 2**32

    for name in source.shapes.keys() - {"layers"}:
        for rows in source.rows(name):
            add(name, rows)
    for name, index in in_layers(source):
        add(f"layers/{name}", source.tensor(name, index))
    return sums


def in_layers(source: Source) -> Iterator[tuple[str, int]]:
    """All layers' parameters in the order in which the source is best asked for them."""
    layers = source.shapes["layers"]
    numbers = range(next((stacked.shape[0] for stacked in layers.values()), 0))
    if source.by_layer:
        yield from ((name, index) for index in numbers for name in layers)
    else:
        yield from ((name, index) for name in layers for index in numbers)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of consecutive rows, in blocks that a host can spare; the same for every dtype."""
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    yield from ((begin, min(begin + step, shape[0])) for begin in range(0, shape[0], step))
