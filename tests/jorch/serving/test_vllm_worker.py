"""What a worker says to a folder of weights before it touches anything."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jorch.serving.worker.jorch_vllm_worker import WorkerExtension, difference, tensors_of

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
