"""vLLM's side of a weight push: a worker extension, loaded by vLLM in its own environment, where jorch is not.

`POST /collective_rpc {"method": "jorch_reload", "kwargs": {"folder": DIR}}` answers {"ok": true, ...} or {"ok": false,
"error": ...}. Beyond vLLM's own `reload_weights` it compares the folder's tensors with those of the running model
before it touches anything (a missing folder or tensor otherwise kills the server at its next request, or leaves a
mixture of old and new weights), and it packs a tied head again, whose packed copy on CPUs keeps the old embedding.

`jorch_check_adapter` answers likewise whether a folder holds an adapter of the running model, whole: vLLM takes what it
finds and leaves out the rest.
"""

import json
import struct
from pathlib import Path
from typing import Any

_HEADER_LENGTH = struct.Struct("<Q")


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a folder of safetensors, from the files' headers.

    Raises ValueError where there is no such file, where an index names others, or where a file is cut short.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"no *.safetensors in {folder}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"].values())
        if listed != {path.name for path in paths}:
            raise ValueError(f"{index} lists {sorted(listed)}, the folder holds {[path.name for path in paths]}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        shapes |= _header(path)
    return shapes


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    with path.open("rb") as file:
        start = file.read(_HEADER_LENGTH.size)
        if len(start) < _HEADER_LENGTH.size:
            raise ValueError(f"{path} is cut short")
        (length,) = _HEADER_LENGTH.unpack(start)
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    needed = _HEADER_LENGTH.size + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if path.stat().st_size < needed:
        raise ValueError(f"{path} is cut short: {path.stat().st_size} bytes of {needed}")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def difference(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> str | None:
    """What speaks against loading `new` where `old` is, in one line."""
    if missing := sorted(old.keys() - new.keys()):
        return f"{len(missing)} tensor(s) missing, first {missing[0]!r}"
    if extra := sorted(new.keys() - old.keys()):
        return f"{len(extra)} tensor(s) too many, first {extra[0]!r}"
    for name, shape in old.items():
        if new[name] != shape:
            return f"tensor {name!r} has shape {new[name]}, the running model {shape}"
    return None


def adapter_difference(base: dict[str, tuple[int, ...]], folder: Path, max_rank: int) -> str | None:
    """What speaks against the adapter in `folder` (PEFT's) beside a model with these tensors, in one line.

    Raises ValueError and OSError where it cannot be read.
    """
    description = json.loads((folder / "adapter_config.json").read_text())
    rank, targets = description["r"], description["target_modules"]
    if rank > max_rank:
        return f"the adapter has rank {rank}, the server was started for {max_rank} at most"
    expected = {}
    for name, shape in base.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.rpartition(".")[2] in targets:
            outputs, inputs = shape
            expected[f"base_model.model.{module}.lora_A.weight"] = (rank, inputs)
            expected[f"base_model.model.{module}.lora_B.weight"] = (outputs, rank)
    return difference(expected, tensors_of(folder))


class WorkerExtension:
    """Mixed into vLLM's worker, whose attributes it uses."""

    def jorch_check_adapter(self, folder: str) -> dict[str, Any]:
        worker: Any = self
        try:
            base, max_rank = tensors_of(Path(worker.model_config.model)), worker.lora_config.max_lora_rank
            problem = adapter_difference(base, Path(folder), max_rank)
        except (OSError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        return {"ok": problem is None, "error": problem}

    def jorch_reload(self, folder: str) -> dict[str, Any]:
        worker: Any = self
        try:
            # The folder that the server was started from may have been replaced since: remember what it held.
            if not hasattr(worker, "_jorch_tensors"):
                worker._jorch_tensors = tensors_of(Path(worker.model_config.model))
            problem = difference(worker._jorch_tensors, tensors_of(Path(folder)))
        except (OSError, ValueError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            return {"ok": False, "error": problem}
        worker.reload_weights(weights_path=folder)
        _pack_tied_head(worker)
        return {"ok": True, "error": None}


def _pack_tied_head(worker: Any) -> None:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    model = worker.model_runner.get_model()
    if current_platform.is_cpu() and getattr(model.config, "tie_word_embeddings", False):
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
