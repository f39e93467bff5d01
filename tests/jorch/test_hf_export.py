"""Parameters to safetensors and back bit by bit; what does not fit is one line and leaves nothing behind."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jorch.export import hf, pretrained
from jorch.model.transformer import Qwen3
from jorch.synth.sft import train_tokenizer

TOKENIZER = train_tokenizer()


def vocabulary(**changes):
    return {"vocab_size": TOKENIZER.vocab_size, "num_hidden_layers": 2} | changes


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(request, tiny_config, random_params, tmp_path_factory):
    """(model, params, folder that they were saved to); copy it before changing it."""
    model = Qwen3(tiny_config(**vocabulary(tie_word_embeddings=request.param)))
    params = random_params(model)
    folder = tmp_path_factory.mktemp("export") / "model"
    hf.save(folder, model.config, params, TOKENIZER)
    return model, params, folder


def test_round_trip_is_bit_exact(exported, mesh):
    model, params, folder = exported
    loaded = pretrained.load(str(folder), mesh)
    assert loaded.model.config == model.config
    assert loaded.tokenizer.digest == TOKENIZER.digest
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_names_and_shapes_are_hugging_faces(exported):
    model, _, folder = exported
    D, F, N, K, H = 16, 24, 4, 2, 8
    tensors = load_file(folder / "model.safetensors")
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    expected = {"model.embed_tokens.weight": (640, D), "model.norm.weight": (D,)}
    expected |= {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    if not model.config.tie_word_embeddings:
        expected["lm_head.weight"] = (640, D)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_files_in_several_parts_and_in_bfloat16(exported, mesh, tmp_path):
    """As the big models are published; a tied head may be stored once more."""
    model, params, folder = exported
    shutil.copytree(folder, tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name] for name in part}, tmp_path / "parts" / f"model-0000{i + 1}-of-00002.safetensors"
        )
    for dtype in ("float32", "bfloat16"):
        loaded = pretrained.load(str(tmp_path / "parts"), mesh, param_dtype=dtype)
        rounded = jax.tree.map(lambda x, dtype=dtype: np.asarray(x, ml_dtypes.bfloat16).astype(dtype), params)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
    hf.save(tmp_path / "low", loaded.model.config, loaded.params, TOKENIZER)
    assert load_file(tmp_path / "low" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **keys):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


GATE = "model.layers.1.mlp.gate_proj.weight"
DAMAGE = {
    "missing tensor": (
        lambda folder: change_tensors(folder, lambda t: t.pop(GATE)),
        f"{{folder}}: tensor '{GATE}' is missing",
    ),
    "extra tensor": (
        lambda folder: change_tensors(folder, lambda t: t.update({"model.layers.0.bias": np.zeros(1, np.float32)})),
        "{folder}: 1 tensor(s) that Qwen3 has no place for, first 'model.layers.0.bias'",
    ),
    "one layer too many": (
        lambda folder: change_config(folder, num_hidden_layers=1),
        "{folder}: 11 tensor(s) that Qwen3 has no place for, first 'model.layers.1.input_layernorm.weight'",
    ),
    "transposed tensor": (
        lambda folder: change_tensors(folder, lambda t: t.update({GATE: np.ascontiguousarray(t[GATE].T)})),
        f"{{folder}}: tensor '{GATE}' has shape (16, 24); the config needs (24, 16)",
    ),
    "wrong shape": (
        lambda folder: change_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)})),
        "{folder}: tensor 'model.norm.weight' has shape (8,); the config needs (16,)",
    ),
    "truncated file": (truncate, "{folder}/model.safetensors: not readable as safetensors ("),
    "empty file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "{folder}/model.safetensors: not readable as safetensors (",
    ),
    "a part that is not there": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2"}}'),
        "{folder}/model.safetensors.index.json names part-2, which is not in the folder; copy it as well",
    ),
    "broken index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "{folder}/model.safetensors.index.json: not an index of safetensors",
    ),
    "biases": (
        lambda folder: change_config(folder, attention_bias=True),
        "{folder}/config.json: attention_bias is True; jorch has False",
    ),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors in {folder}"),
    "other architecture": (
        lambda folder: change_config(folder, model_type="llama"),
        "{folder}/config.json: model_type is 'llama'; jorch reads 'qwen3'",
    ),
    "stretched rotary embeddings": (
        lambda folder: change_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "{folder}/config.json: rope_type is 'yarn'; jorch has plain rotary embeddings ('default')",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in {folder}"),
    "broken config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": '),
        "{folder}/config.json: not valid JSON (",
    ),
    "config without a size": (
        lambda folder: change_config(folder, head_dim=None),
        "{folder}/config.json: head_dim: Field required",
    ),
    "config with a wrong size": (
        lambda folder: change_config(folder, num_key_value_heads=3),
        "{folder}/config.json: num_attention_heads=4 is not a multiple of num_key_value_heads=3",
    ),
    "vocabulary smaller than the tokenizer's": (
        lambda folder: change_config(folder, vocab_size=576),
        "{folder}: vocab_size=576 is smaller than the tokenizer's 640",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer.*")],
        "no tokenizer at {folder}/tokenizer.json; set tokenizer.path to a huggingface tokenizer",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"\x00\x01"),
        "{folder}/tokenizer.model is not a sentencepiece tokenizer: ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_line(kind, exported, mesh, tmp_path):
    _, _, folder = exported
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(ValueError) as caught:
        pretrained.load(str(copy), mesh)
    line = str(caught.value)
    assert line.startswith(message.format(folder=copy))
    assert "\n" not in line
    assert caught.traceback[-1].frame.f_globals["__name__"].startswith("jorch.")  # else the CLI shows a traceback


def test_a_folder_that_is_not_there_is_one_line(mesh, tmp_path):
    with pytest.raises(ValueError, match=r"init_from='.*nowhere' is no folder; give one with safetensors, or \"base\""):
        pretrained.load(str(tmp_path / "nowhere"), mesh)


class FullDisk:
    """A tokenizer whose file does not fit any more."""

    end_of_turn_id = 3

    def save(self, folder):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_reaches_the_disk_before_it_gets_its_name(durable, tmp_path, monkeypatch):
    """Every file and the folder, then the rename, then the folder's parent."""
    events, rename = [], Path.rename

    def fsync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    def renamed(path, target):
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with hf.replaced(tmp_path / "out", durable=durable) as partial:
        (partial / "inner").mkdir()
        for name in ("a", "inner/b"):
            (partial / name).write_text(name)
    if durable:
        *before, renaming, parent = events
        assert {*before} == {partial, partial / "a", partial / "inner", partial / "inner/b"}
        assert (renaming, parent) == ("renamed", tmp_path)
    else:
        assert events == ["renamed"]


def test_a_save_that_fails_leaves_the_old_folder_whole(exported, mesh, tmp_path):
    model, params, _ = exported
    folder = tmp_path / "model"
    with pytest.raises(OSError, match="No space left"):
        hf.save(folder, model.config, params, FullDisk())
    assert not folder.exists()
    hf.save(folder, model.config, params, TOKENIZER)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        hf.save(folder, model.config, jax.tree.map(lambda x: x + 1, params), FullDisk())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    hf.save(folder, model.config, params, TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "a later save clears what a failed one left"
