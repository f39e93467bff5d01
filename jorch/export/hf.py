"""Parameters to Hugging Face safetensors and back, by one name table."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jorch.config import ModelConfig
from jorch.data.tokenizer import Tokenizer
from jorch.export import probe
from jorch.model.transformer import Params, Qwen3
from jorch.run_folder import naming

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
_ARCHITECTURE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)

ARCHITECTURE = "architecture"
"""Folder of a training run with its model's config.json and tokenizer: what its checkpoints lack to be a model."""


def _to_hf(name: str, array: np.ndarray) -> np.ndarray:
    """Our layer matrix as torch keeps it: [out, in], heads flattened into one axis."""
    if name in ("q", "k", "v"):
        array = array.reshape(array.shape[0], -1)
    elif name == "o":
        array = array.reshape(-1, array.shape[-1])
    return np.ascontiguousarray(array.T) if array.ndim == 2 else array


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What `_to_hf` makes of our layer parameter's shape."""
    if name in ("q", "k", "v"):
        return math.prod(shape[1:]), shape[0]
    return (shape[-1], math.prod(shape[:-1])) if name == "o" else shape[::-1]


def _tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    for name, hf_name in _TOP.items():
        if name in params:
            yield hf_name, np.asarray(params[name])
    for name, stacked in params["layers"].items():
        for index in range(stacked.shape[0]):
            yield f"model.layers.{index}.{_LAYER[name]}", _to_hf(name, np.asarray(stacked[index]))


def save(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer into `folder`, which they replace.

    With `facts`, which may be empty, also `jorch.json`: these and the probe.
    The folder appears whole or not at all: it is written beside its place and renamed. Raises OSError naming it.
    """
    with _replaced(folder) as partial:
        save_file(dict(_tensors(params)), partial / "model.safetensors", metadata={"format": "pt"})
        _write_architecture(partial, config, tokenizer)
        if facts is not None:
            probe.write(partial, probe.make_probe(config, params), **facts)


def save_architecture(run_folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write `run_folder`/architecture. Raises OSError naming it."""
    with _replaced(run_folder / ARCHITECTURE) as partial:
        _write_architecture(partial, config, tokenizer)


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, and leaves nothing behind after a failure."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    with naming(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_architecture(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    (folder / "config.json").write_text(json.dumps(_config_json(config, tokenizer), indent=2) + "\n")
    stop = tokenizer.end_of_turn_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop, "pad_token_id": stop}) + "\n")
    tokenizer.save(folder)


def _config_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in _ARCHITECTURE_KEYS},
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": config.param_dtype,
        "eos_token_id": tokenizer.end_of_turn_id,
    }


def load_config(folder: Path, **settings: Any) -> ModelConfig:
    """The architecture from `config.json`, with run settings (dtypes, remat) beside it.

    Raises ValueError for a missing or unreadable file or another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no config.json in {folder}; it must be a folder of Hugging Face safetensors")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy or export the folder again") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type != "qwen3":
        raise ValueError(f"{path}: model_type is {model_type!r}; jorch reads 'qwen3'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"{path}: rope_type is {rope_type!r}; jorch has plain rotary embeddings ('default')")
    known = {key: raw[key] for key in _ARCHITECTURE_KEYS if key in raw}
    if "rope_theta" in rope:
        known["rope_theta"] = rope["rope_theta"]
    try:
        return ModelConfig(**(known | settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {key + ': ' if key else ''}{reason}") from error


def load(folder: Path, model: Qwen3, mesh: Mesh) -> Params:
    """Read safetensors (one file, or several with an index) straight into the model's shardings.

    Raises ValueError naming a tensor that is missing, left over, or of another shape, and a truncated file.
    """
    abstract, shardings = model.abstract_params(), model.shardings(mesh)
    try:
        with _Reader(folder) as reader:
            params = {
                name: jax.device_put(
                    reader.read(_TOP[name], abstract[name].shape).astype(abstract[name].dtype),
                    shardings[name],
                )
                for name in abstract
                if name != "layers"
            }
            params["layers"] = {
                name: _read_stacked(reader, name, x, shardings["layers"][name])
                for name, x in abstract["layers"].items()
            }
            reader.refuse_leftovers(tied=model.config.tie_word_embeddings)
            return params
    except SafetensorError as error:
        raise ValueError(f"{folder}: not readable as safetensors ({error}); copy or export it again") from error


def _read_stacked(reader: "_Reader", name: str, abstract: Any, place: Any) -> jax.Array:
    num_layers, shape = abstract.shape[0], abstract.shape[1:]
    layers = [
        reader.read(f"model.layers.{index}.{_LAYER[name]}", _hf_shape(name, shape)).T.reshape(shape)
        for index in range(num_layers)
    ]
    return jax.device_put(np.stack(layers).astype(abstract.dtype), place)


class _Reader:
    """Tensors by name over all safetensors files of a folder; remembers what was read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = sorted(folder.glob("*.safetensors"))
        if not self._paths:
            raise ValueError(f"no *.safetensors in {folder}")
        self._files: dict[str, Any] = {}
        self._opened: list[Any] = []

    def __enter__(self) -> "_Reader":
        for path in self._paths:
            file = safe_open(path, framework="numpy")
            self._opened.append(file.__enter__())
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._opened:
            file.__exit__(*error)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self._files:
            raise ValueError(f"{self._folder}: tensor {name!r} is missing")
        array = self._files.pop(name).get_tensor(name)
        if array.shape != shape:
            raise ValueError(f"{self._folder}: tensor {name!r} has shape {array.shape}; the config needs {shape}")
        return array

    def refuse_leftovers(self, *, tied: bool) -> None:
        # Tied checkpoints of transformers may still carry the head, equal to the embedding.
        leftovers = sorted(name for name in self._files if not (tied and name == "lm_head.weight"))
        if leftovers:
            raise ValueError(
                f"{self._folder}: {len(leftovers)} tensor(s) that Qwen3 has no place for, first {leftovers[0]!r}"
            )
