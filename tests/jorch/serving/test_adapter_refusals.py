"""What a worker says to an adapter's folder before it touches anything: adapters as jorch writes them, whole or not."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jorch.export import adapter
from jorch.export import tensors as export
from jorch.export.source import Held, flat_adapter
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3
from jorch.sections import LoraConfig
from jorch.serving.worker.jorch_vllm_worker import WorkerExtension

LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def base(tiny_config, random_params, tmp_path_factory):
    """(model, folder) of the weights that a server was started with."""
    model, folder = Qwen3(tiny_config()), tmp_path_factory.mktemp("base")
    export.save(folder, Held(random_params(model)))
    return model, folder


def save_adapter(model, lora, folder):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), LoraQwen3(model, lora).abstract_params())
    adapter.save(folder, lora, Held(flat_adapter(zeros)), "base")


@pytest.fixture
def ask(base):
    """What a worker that serves adapters up to rank 8 says of a folder: its error."""

    class Worker(WorkerExtension):
        model_config = type("Config", (), {"model": str(base[1])})
        lora_config = type("Lora", (), {"max_lora_rank": 8})

    def run(folder):
        answer = Worker().jorch_check_adapter(str(folder))
        assert answer["ok"] == (answer["error"] is None)
        return answer["error"]

    return run


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=8, targets=("q", "down"))], ids=["all", "some"])
def test_whole_adapters_are_taken(lora, base, ask, tmp_path):
    save_adapter(base[0], lora, tmp_path / "adapter")
    assert ask(tmp_path / "adapter") is None


def test_adapters_of_another_rank_or_base_are_refused(base, ask, tiny_config, tmp_path):
    save_adapter(base[0], LoraConfig(rank=9), tmp_path / "rank")
    assert ask(tmp_path / "rank") == "the adapter has rank 9, the server was started for 8 at most"
    deeper = Qwen3(tiny_config(num_hidden_layers=3))
    save_adapter(deeper, LORA, tmp_path / "deeper")
    assert ask(tmp_path / "deeper") == (
        "14 tensor(s) too many, first 'base_model.model.model.layers.2.mlp.down_proj.lora_A.weight'"
    )
    wider = Qwen3(tiny_config(hidden_size=48))
    save_adapter(wider, LORA, tmp_path / "wider")
    assert ask(tmp_path / "wider") == (
        "tensor 'base_model.model.model.layers.0.mlp.down_proj.lora_B.weight' has shape (48, 4), the running model (16, 4)"
    )


@pytest.mark.parametrize("damage", ["nothing there", "no weights", "cut short", "no rank", "missing", "extra"])
def test_damaged_adapters_are_refused(damage, base, ask, tmp_path):
    folder = tmp_path / "adapter"
    if damage == "nothing there":
        assert "adapter_config.json" in ask(folder)
        return
    save_adapter(base[0], LORA, folder)
    weights, description = folder / adapter.WEIGHTS, folder / adapter.CONFIG
    tensors = load_file(weights)
    last = max(tensors)
    match damage:
        case "no weights":
            weights.unlink()
            expected = f"ValueError: no *.safetensors in {folder}"
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1])
            expected = f"ValueError: {weights} is cut short"
        case "no rank":
            description.write_text(json.dumps({"target_modules": ["q_proj"]}))
            expected = "KeyError: 'r'"
        case "missing":
            save_file({name: x for name, x in tensors.items() if name != last}, weights)
            expected = f"1 tensor(s) missing, first {last!r}"
        case _:
            save_file(tensors | {"lm_head.lora_A.weight": tensors[last]}, weights)
            expected = "1 tensor(s) too many, first 'lm_head.lora_A.weight'"
    assert ask(folder).startswith(expected)
