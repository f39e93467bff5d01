"""The tensors of a Hugging Face folder, one at a time: never more than one of them is in host memory.

Owns the two-way name table and the two layouts. Reading goes from the file into the target sharding, of which each host
reads its own part; writing goes from the device into the file. `hf.py` is its only user.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from jorch.export.source import Source, in_layers, row_blocks
from jorch.model.transformer import Params, Qwen3

_TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembed": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""Hugging Face's own limit of one file."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def layer_name(index: int, name: str) -> str:
    """Hugging Face's name of a parameter of layer `index`."""
    return f"model.layers.{index}.{_LAYER[name]}"


def _hf_axes(name: str, axes: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Our layer parameter's axes (sizes, or mesh axes) as torch has them, [out, in]: groups of ours, flattened."""
    match name:
        case "q" | "k" | "v":
            return axes[1:], axes[:1]
        case "o":
            return axes[-1:], axes[:-1]
        case _:
            return tuple((axis,) for axis in reversed(axes))


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(group) for group in _hf_axes(name, shape))


def _hf_sharding(name: str, place: NamedSharding) -> NamedSharding:
    """Where a layer's tensor in torch's layout lies, so that no device needs another one's part of it."""
    # Of a flattened group the first axis (heads) is sharded and the second (head_dim) never.
    spec = [group[0] for group in _hf_axes(name, tuple(place.spec)[1:])]
    return NamedSharding(place.mesh, PartitionSpec(*spec))


def _in_order(params: Params) -> list[str]:
    """The parameters outside of layers; tied models have no head."""
    return [name for name in _TOP if name in params]


class Reader:
    """Tensors by name over all safetensors files of a folder; remembers what was read. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = _files(folder)
        self._files: dict[str, Any] = {}
        self._opened: list[Any] = []

    def __enter__(self) -> "Reader":
        for path in self._paths:
            try:
                file = safe_open(path, framework="numpy").__enter__()
            except SafetensorError as error:
                self.__exit__()
                raise ValueError(f"{path}: not readable as safetensors ({error}); copy or export it again") from error
            self._opened.append(file)
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._opened:
            file.__exit__(None, None, None)

    def dtype(self, name: str) -> str:
        """The stored type, as numpy names it. Raises ValueError where it is neither float32 nor bfloat16."""
        found = self._of(name).get_slice(name).get_dtype()
        known = {theirs: ours for ours, theirs in _DTYPES.items()}
        if found not in known:
            raise ValueError(f"{self._folder}: tensor {name!r} is {found}; give the dtype to convert to")
        return known[found]

    def _of(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self._folder}: tensor {name!r} is missing")
        return self._files[name]

    def read(self, name: str, shape: tuple[int, ...], place: NamedSharding) -> jax.Array:
        """The tensor in its stored type on `place`; every host reads its part only."""
        stored = self.stored(name, shape)
        del self._files[name]
        return jax.make_array_from_callback(shape, place, lambda index: stored[index])

    def stored(self, name: str, shape: tuple[int, ...]) -> Any:
        """The tensor in the file, to be indexed; it does not count as read. Raises ValueError for another shape."""
        stored = self._of(name).get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(
                f"{self._folder}: tensor {name!r} has shape {tuple(stored.get_shape())}; the config needs {shape}"
            )
        return stored

    def refuse_leftovers(self, *, tied: bool) -> None:
        # Tied checkpoints of transformers may still carry the head, equal to the embedding.
        leftovers = sorted(name for name in self._files if not (tied and name == "lm_head.weight"))
        if leftovers:
            raise ValueError(
                f"{self._folder}: {len(leftovers)} tensor(s) that Qwen3 has no place for, first {leftovers[0]!r}"
            )


def _files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of its index, or all. Raises ValueError where one is missing."""
    index = folder / INDEX
    if not index.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"no *.safetensors in {folder}")
        return paths
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors; copy or export the folder again") from error
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not in the folder; copy it as well")
    return [folder / name for name in names]


def stored_dtype(folder: Path) -> str:
    """In which of our parameter types a folder keeps its embedding. Raises ValueError where in none of them."""
    with Reader(folder) as reader:
        return reader.dtype(_TOP["embed"])


class OfFiles:
    """The parameters in a folder's files, read when they are asked for and held no longer: a `Source`."""

    by_layer = False

    def __init__(self, reader: Reader, model: Qwen3) -> None:
        self.shapes: Params = model.abstract_params()
        self._reader = reader

    def rows(self, name: str) -> Iterator[jax.Array]:
        """Raises ValueError where they are missing or of another shape."""
        x = self.shapes[name]
        stored = self._reader.stored(_TOP[name], x.shape)
        for begin, end in row_blocks(x.shape):
            yield jnp.asarray(stored[begin:end]).astype(x.dtype)

    def tensor(self, name: str, index: int) -> jax.Array:
        """Raises ValueError where it is missing or of another shape."""
        x = self.shapes["layers"][name]
        shape = x.shape[1:]
        stored = self._reader.stored(layer_name(index, name), _hf_shape(name, shape))
        return jnp.asarray(stored[:]).T.reshape(shape).astype(x.dtype)


def load(folder: Path, model: Qwen3, mesh: Mesh) -> Params:
    """Parameters from safetensors (one file, or several with an index), born in the model's shardings.

    Host memory: one tensor. Raises ValueError naming a tensor that is missing, left over, or of another shape, and a
    file that is truncated or missing.
    """
    abstract, shardings = model.abstract_params(), model.shardings(mesh)
    with Reader(folder) as reader:
        params: Params = {}
        for name in _in_order(abstract):
            tensor = reader.read(_TOP[name], abstract[name].shape, shardings[name])
            params[name] = _cast(tensor, abstract[name].dtype)
        params["layers"] = {
            name: _read_stacked(reader, name, x, shardings["layers"][name]) for name, x in abstract["layers"].items()
        }
        reader.refuse_leftovers(tied=model.config.tie_word_embeddings)
        return params


@partial(jax.jit, static_argnums=1)
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


def _read_stacked(reader: Reader, name: str, abstract: Any, place: NamedSharding) -> jax.Array:
    num_layers, shape = abstract.shape[0], abstract.shape[1:]

    @partial(jax.jit, donate_argnums=0, out_shardings=place)
    def insert(stack: jax.Array, tensor: jax.Array, index: jax.Array) -> jax.Array:
        layer = tensor.T.reshape(shape).astype(abstract.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, layer, index, axis=0)

    stack = jax.jit(partial(jnp.zeros, abstract.shape, abstract.dtype), out_shardings=place)()
    for index in range(num_layers):
        tensor = reader.read(layer_name(index, name), _hf_shape(name, shape), _hf_sharding(name, place))
        # Without waiting, the host would read ahead of the devices and hold what they have not taken yet.
        stack = jax.block_until_ready(insert(stack, tensor, jnp.int32(index)))
    return stack


def save(folder: Path, source: Source, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write parameters as `model.safetensors`, or as several files of at most `max_shard_bytes` with an index.

    Host memory: one layer's largest tensor twice, or a block of the embedding. Raises OSError.
    """
    order = list(_order(source))
    shapes = [_described(source.shapes, name, index) for name, index in order]
    files: list[list[int]] = [[]]
    size = 0
    for number, (_, shape, dtype) in enumerate(shapes):
        num_bytes = math.prod(shape) * dtype.itemsize
        if files[-1] and size + num_bytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].append(number)
        size += num_bytes
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in shapes)
        weight_map = {shapes[i][0]: name for name, numbers in zip(names, files, strict=True) for i in numbers}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, numbers in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header([shapes[i] for i in numbers]))
            for number in numbers:
                for block in _blocks(source, *order[number]):
                    # As plain bytes: bfloat16 has no buffer format of its own.
                    file.write(block.view(np.uint8).data)


_Described = tuple[str, tuple[int, ...], np.dtype[Any]]


def _header(tensors: list[_Described]) -> bytes:
    """The head of a safetensors file: its own length as u64, then JSON, padded so that the data is aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape, dtype in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _order(source: Source) -> Iterator[tuple[str, int | None]]:
    """Our names in the order of the file, with the layer's number where there is one."""
    for name in _in_order(source.shapes):
        yield name, None
    yield from in_layers(source)


def _described(shapes: Params, name: str, index: int | None) -> _Described:
    if index is None:
        return _TOP[name], shapes[name].shape, np.dtype(shapes[name].dtype)
    stacked = shapes["layers"][name]
    return layer_name(index, name), _hf_shape(name, stacked.shape[1:]), np.dtype(stacked.dtype)


def _blocks(source: Source, name: str, index: int | None) -> Iterator[np.ndarray]:
    """A tensor in torch's layout, as its consecutive blocks."""
    if index is None:
        yield from (np.ascontiguousarray(rows) for rows in source.rows(name))
    else:
        layer = np.asarray(source.tensor(name, index))
        # [in..., out...] to torch's [out, in].
        rows, columns = _hf_shape(name, layer.shape) if layer.ndim > 1 else (1, layer.size)
        yield np.ascontiguousarray(layer.reshape(columns, rows).T)
