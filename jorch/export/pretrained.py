"""A trained model from a folder: weights, architecture and tokenizer together, placed on a mesh."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jorch.data import tokenizer as tokenizers
from jorch.data.tokenizer import Tokenizer
from jorch.export import hf, tensors, weights
from jorch.export.source import Source
from jorch.model.transformer import Params, Qwen3
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh

BASE = Path(__file__).parent.parent / "assets" / "base"
"""The tiny pretrained orchestrator of the quickstart, which ships with the package."""


@dataclass(frozen=True)
class Pretrained:
    """What `init_from` names."""

    model: Qwen3
    params: Params
    tokenizer: Tokenizer

    def without_params(self) -> "Pretrained":
        """Model and tokenizer alone, so that the parameters' memory can go."""
        return replace(self, params={})


def folder_of(init_from: str, key: str = "init_from") -> Path:
    """The folder that `init_from` means: "base", or a path. Raises ValueError, naming `key`, where there is none."""
    folder = BASE if init_from == "base" else Path(init_from)
    if not folder.is_dir():
        raise ValueError(f'{key}={init_from!r} is no folder; give one with safetensors, or "base"')
    return folder


def load(init_from: str, mesh: Mesh, **settings: Any) -> Pretrained:
    """Read a model and its tokenizer, from safetensors or from what `jorch import` wrote.

    `settings` are the run's own keys of ModelConfig (dtypes, remat).

    Raises ValueError where the folder, a tensor or the vocabulary does not fit.
    """
    folder = folder_of(init_from)
    model, tokenizer = load_model(folder, **settings)
    read = weights.load if weights.is_checkpoint(folder) else hf.load
    return Pretrained(model, read(folder, model, mesh), tokenizer)


@contextmanager
def opened(init_from: str, **settings: Any) -> Iterator[Source]:
    """The parameters that `load` would read, without reading them yet. Raises ValueError as `load`."""
    folder = folder_of(init_from)
    model, _ = load_model(folder, **settings)
    if weights.is_checkpoint(folder):
        yield weights.Stored(folder, model, make_mesh(MeshConfig()))
    else:
        with tensors.Reader(folder) as reader:
            yield tensors.OfFiles(reader, model)


def load_model(folder: Path, **settings: Any) -> tuple[Qwen3, Tokenizer]:
    """The model and its tokenizer without the weights.

    Raises ValueError where the folder or the vocabulary does not fit.
    """
    architecture = folder / hf.ARCHITECTURE if weights.is_checkpoint(folder) else folder
    config = hf.load_config(architecture, **settings)
    tokenizer = tokenizers.load_folder(architecture)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{folder}: vocab_size={config.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    return Qwen3(config), tokenizer
