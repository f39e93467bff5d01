"""A folder as Hugging Face keeps models: config.json and tokenizer here, the tensors in `tensors.py`."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jorch.data.tokenizer import Tokenizer
from jorch.export import probe, tensors
from jorch.export.source import Held, Source
from jorch.export.tensors import load as load
from jorch.model.transformer import Params
from jorch.run_folder import naming
from jorch.sections import ModelConfig

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

_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
"""Of what a Qwen3 config can say, what no published dense size does otherwise."""

__all__ = [
    "ARCHITECTURE",
    "load",
    "load_config",
    "replaced",
    "save",
    "save_architecture",
    "stored_config",
    "write",
    "write_architecture",
]

ARCHITECTURE = "architecture"
"""Folder of a training run with its model's config.json and tokenizer: what its checkpoints lack to be a model."""


def save(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """`write` of parameters in memory."""
    write(folder, config, Held(params), tokenizer, facts)


def write(
    folder: Path,
    config: ModelConfig,
    source: Source,
    tokenizer: Tokenizer,
    facts: Mapping[str, Any] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer into `folder`, which they replace.

    With `facts`, which may be empty, also `jorch.json`: these and the probe. The folder appears whole or not at all:
    as `replaced`. Raises OSError naming it.
    """
    with replaced(folder, durable=durable) as partial:
        tensors.save(partial, source)
        write_architecture(partial, config, tokenizer)
        if facts is not None:
            probe.write(partial, probe.make_probe(config, source), **facts)


def save_architecture(run_folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write `run_folder`/architecture. Raises OSError naming it."""
    with replaced(run_folder / ARCHITECTURE) as partial:
        write_architecture(partial, config, tokenizer)


@contextmanager
def replaced(folder: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, and leaves nothing behind after a failure.

    It is written beside its place and renamed. If `durable`, that is after all of it has reached the disk, so that not
    even a power cut leaves half of it under its name.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    with naming(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if durable:
                for path in (*partial.rglob("*"), partial):
                    _sync(path)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            if durable:
                _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_architecture(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    (folder / "config.json").write_text(json.dumps(_config_json(config, tokenizer), indent=2) + "\n")
    stop = tokenizer.end_of_turn_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop, "pad_token_id": stop}) + "\n")
    tokenizer.save(folder)


def _config_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: getattr(config, key) for key in _ARCHITECTURE_KEYS},
        **_FIXED,
        "torch_dtype": config.param_dtype,
        "eos_token_id": tokenizer.end_of_turn_id,
    }


def stored_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it is. Raises ValueError for a missing or unreadable file or another architecture."""
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
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}; jorch has {value!r}")
    return raw


def load_config(folder: Path, **settings: Any) -> ModelConfig:
    """The architecture from `config.json`, with run settings (dtypes, remat) beside it.

    Raises ValueError for a missing or unreadable file or another architecture.
    """
    path, raw = folder / "config.json", stored_config(folder)
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
