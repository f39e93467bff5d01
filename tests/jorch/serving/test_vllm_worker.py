"""What a worker says to a folder of weights before it touches anything."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jorch.serving.worker.jorch_vllm_worker import WorkerExtension, adapter_difference, difference, tensors_of

SHAPES = {"a": (2, 3), "b": (4,)}


def write(path, shapes):
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)


def test_shapes_are_read_over_all_files(tmp_path):
    write(tmp_path / "one.safetensors", {"a": (2, 3)})
    write(tmp_path / "two.safetensors", {"b": (4,)})
    assert tensors_of(tmp_path) == SHAPES


def test_what_differs_is_named():
    assert difference(SHAPES, SHAPES) is None
    assert difference(SHAPES, {"a": (2, 3)}) == "1 tensor(s) missing, first 'b'"
    assert difference({"a": (2, 3)}, SHAPES) == "1 tensor(s) too many, first 'b'"
    assert difference(SHAPES, SHAPES | {"a": (3, 2)}) == "tensor 'a' has shape (3, 2), the running model (2, 3)"


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.safetensors in"):
        tensors_of(tmp_path)
    path = tmp_path / "model.safetensors"
    write(path, SHAPES)
    whole = path.read_bytes()
    for kept in (len(whole) - 1, 4):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="model.safetensors is cut short"):
            tensors_of(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="lists"):
        tensors_of(tmp_path)


def test_a_refusal_leaves_the_running_model_alone(tmp_path):
    """`reload_weights` is vLLM's own, which must not be reached."""

    class Worker(WorkerExtension):
        def __init__(self, folder):
            self.model_config = type("Config", (), {"model": str(folder)})
            self.reloaded = []

        def reload_weights(self, weights_path):
            self.reloaded.append(weights_path)

    running, other = tmp_path / "running", tmp_path / "other"
    running.mkdir()
    write(running / "model.safetensors", SHAPES)
    worker = Worker(running)
    answer = worker.jorch_reload(str(other))
    assert answer["ok"] is False
    assert "no *.safetensors" in answer["error"]
    other.mkdir()
    write(other / "model.safetensors", {"a": (2, 3)})
    assert worker.jorch_reload(str(other)) == {"ok": False, "error": "1 tensor(s) missing, first 'b'"}
    assert worker.reloaded == []


BASE = {
    "model.embed_tokens.weight": (9, 6),
    "model.layers.0.self_attn.q_proj.weight": (4, 6),
    "model.layers.0.mlp.down_proj.weight": (6, 8),
    "model.layers.0.input_layernorm.weight": (6,),
}
ADAPTER = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 6),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (4, 2),
}


def test_an_adapter_must_be_whole_and_of_the_running_model(tmp_path):
    def problem(shapes, rank=2, targets=("q_proj",), max_rank=8):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank, "target_modules": targets}))
        write(tmp_path / "adapter_model.safetensors", shapes)
        return adapter_difference(BASE, tmp_path, max_rank)

    q = "base_model.model.model.layers.0.self_attn.q_proj"
    assert problem(ADAPTER) is None
    assert problem({f"{q}.lora_A.weight": (2, 6)}) == f"1 tensor(s) missing, first '{q}.lora_B.weight'"
    assert problem(ADAPTER, targets=("q_proj", "down_proj")).startswith("2 tensor(s) missing, first 'base_model.model")
    assert problem(ADAPTER, targets=()).startswith("2 tensor(s) too many, first ")
    assert problem(ADAPTER | {f"{q}.lora_B.weight": (5, 2)}) == (
        f"tensor '{q}.lora_B.weight' has shape (5, 2), the running model (4, 2)"
    )
    assert problem(ADAPTER, max_rank=1) == "the adapter has rank 2, the server was started for 1 at most"
