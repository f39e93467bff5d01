"""A LoRA adapter as PEFT keeps it, which vLLM and transformers load beside the base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from jorch.export import hf, probe
from jorch.export.source import Source, in_layers
from jorch.export.tensors import layer_name
from jorch.model.transformer import Params
from jorch.sections import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapter(NamedTuple):
    """What samplers are given that hold its base already."""

    params: Params
    """As `LoraQwen3` has them."""
    lora: LoraConfig
    probe: probe.Probe
    """Of base and adapter together."""


def save(
    folder: Path,
    lora: LoraConfig,
    source: Source,
    base: str,
    expected: probe.Probe | None = None,
    facts: Mapping[str, Any] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write the adapter's parameters (of `flat_adapter`'s names) and PEFT's description of them, whole or not at all.

    They are held in memory once. `base` is where the frozen weights are, as PEFT's `base_model_name_or_path`. With
    `expected` also `jorch.json`: this probe and the `facts`. `durable`: as `hf.replaced`.

    Raises OSError naming `folder`.
    """
    tensors: dict[str, np.ndarray] = {}
    for flat_name, index in in_layers(source):
        _, name, half = flat_name.split("/")
        x = np.asarray(source.tensor(flat_name, index), np.float32)
        module = f"base_model.model.{layer_name(index, name).removesuffix('.weight')}"
        # [in..., R] and [R, out...] to torch's [out, in].
        x = x.reshape(-1, lora.rank) if half == "a" else x.reshape(lora.rank, -1)
        tensors[f"{module}.lora_{half.upper()}.weight"] = np.ascontiguousarray(x.T)
    with hf.replaced(folder, durable=durable) as written:
        save_file(tensors, written / WEIGHTS, {"format": "pt"})
        (written / CONFIG).write_text(json.dumps(_description(lora, base), indent=2) + "\n")
        if expected is not None:
            probe.write(written, expected, **(facts or {}))


def _description(lora: LoraConfig, base: str) -> dict[str, object]:
    modules = {layer_name(0, name).split(".")[-2] for name in lora.targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
