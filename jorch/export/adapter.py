"""A LoRA adapter as PEFT keeps it, which vLLM and transformers load beside the base."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jorch.export import hf
from jorch.export.tensors import layer_name
from jorch.model.transformer import Params
from jorch.sections import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, lora: LoraConfig, params: Params, base: str) -> None:
    """Write the adapter's parameters (as in `model/lora.py`) and PEFT's description of them, whole or not at all.

    `base` is where the frozen weights are, as PEFT's `base_model_name_or_path`. Raises OSError naming `folder`.
    """
    adapter = params["layers"]["adapter"]
    tensors: dict[str, np.ndarray] = {}
    for name, pair in adapter.items():
        stacked_a, stacked_b = (np.asarray(x, np.float32) for x in (pair["a"], pair["b"]))
        for index, (a, b) in enumerate(zip(stacked_a, stacked_b, strict=True)):
            module = f"base_model.model.{layer_name(index, name).removesuffix('.weight')}"
            # [in..., R] and [R, out...] to torch's [out, in].
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    with hf.replaced(folder) as written:
        save_file(tensors, written / WEIGHTS, {"format": "pt"})
        (written / CONFIG).write_text(json.dumps(_description(lora, base), indent=2) + "\n")


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
