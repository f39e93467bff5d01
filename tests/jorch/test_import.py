"""`jorch import` and `jorch export`: what comes out is what went in, byte by byte, in one file or several."""

import json
import os
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jorch.cli import main
from jorch.export import hf, pretrained, probe, tensors
from jorch.export.pretrained import BASE
from jorch.export.source import Held
from jorch.model.transformer import Qwen3
from jorch.plan.job import PUBLISHED
from jorch.synth.sft import train_tokenizer
from tests.jorch.published import SIZES, config_json

TOKENIZER = train_tokenizer()


@pytest.fixture
def jorch(capsys):
    def run(*words, status=0):
        assert main([str(word) for word in words]) == status
        captured = capsys.readouterr()
        return (captured.err if status else captured.out).strip()

    return run


def stored(folder):
    """Name -> (dtype, shape, bytes) over all files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= {name: (t.dtype, t.shape, t.tobytes()) for name, t in load_file(path).items()}
    return found


TIED, UNTIED = ("float32", True), ("bfloat16", False)


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def published(request, tiny_config, tmp_path_factory):
    """A folder as a model is published: in two parts with an index, written by safetensors itself."""
    dtype, tied = request.param
    sizes = {"vocab_size": TOKENIZER.vocab_size, "param_dtype": dtype, "tie_word_embeddings": tied}
    config = tiny_config(**sizes, hidden_size=32, num_hidden_layers=3)
    folder = tmp_path_factory.mktemp("published") / "hf"
    folder.mkdir()
    hf.write_architecture(folder, config, TOKENIZER)
    rng = np.random.default_rng(0)
    parts = ({}, {})
    for number, (name, shape) in enumerate(hf_shapes(config).items()):
        parts[number % 2][name] = rng.normal(size=shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, config


def hf_shapes(config):
    D, F, V, H = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_norm": (H,),
        "self_attn.k_norm": (H,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def test_an_export_of_an_import_is_byte_identical(jorch, published, tmp_path):
    folder, config = published
    said = jorch("import", "--from", folder, "--out", tmp_path / "ckpt")
    assert (
        said
        == f"imported {folder} to {tmp_path / 'ckpt'}: {Qwen3(config).num_params():,} parameters in {config.param_dtype}"
    )
    jorch("export", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert stored(tmp_path / "out") == stored(folder)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    line = jorch("import", "--from", folder, "--out", tmp_path / "out", status=2)
    assert line == f"jorch: error: {tmp_path / 'out'} is not an empty folder; choose another --out"


@pytest.mark.parametrize("published", [UNTIED], indirect=True, ids=["untied"])
def test_an_export_names_its_source(jorch, published, tmp_path):
    """The same one whatever form it leaves in, and another one after a change of one number."""
    folder, _ = published

    def digest(source, name, *options):
        jorch("import", "--from", source, "--out", tmp_path / f"{name}.ckpt")
        jorch("export", tmp_path / f"{name}.ckpt", "--out", tmp_path / name, *options)
        return json.loads((tmp_path / name / probe.FILE).read_text())["source_digest"]

    first = digest(folder, "first")
    assert len(first) == 64
    assert digest(folder, "second", "--dtype", "bf16") == first
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] += 1
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    save_file(tensors, changed / path.name, {"format": "pt"})
    assert digest(changed, "third") != first


@pytest.mark.parametrize("published", [UNTIED], indirect=True, ids=["untied"])
def test_an_export_in_the_other_type(jorch, published, mesh, qwen3_logits, tmp_path):
    """Its config says so, its tensors are rounded once, and its probe is of the rounded ones."""
    folder, config = published
    short, wanted = ("bf16", "bfloat16") if config.param_dtype == "float32" else ("f32", "float32")
    jorch("import", "--from", folder, "--out", tmp_path / "ckpt")
    jorch("export", tmp_path / "ckpt", "--out", tmp_path / "same")
    jorch("export", tmp_path / "ckpt", "--out", tmp_path / "out", "--dtype", short)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == wanted
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            expected = tensor.astype(np.dtype(getattr(ml_dtypes, wanted, wanted)))
            dtype, _, content = stored(tmp_path / "out")[name]
            assert (dtype, content) == (expected.dtype, expected.tobytes())
    found, same = probe.read(tmp_path / "out"), probe.read(tmp_path / "same")
    params = pretrained.load(str(tmp_path / "out"), mesh, param_dtype="float32").params
    logits = qwen3_logits(params, config, np.array(found.token_ids))[:-1]
    total = np.logaddexp.reduce(logits, axis=-1)
    exact = logits[np.arange(len(total)), found.token_ids[1:]] - total
    # Float32 against float64, of logits in the tens.
    np.testing.assert_allclose(found.logprobs, exact, rtol=1e-4, atol=1e-3)
    if short == "bf16":
        assert np.abs(np.subtract(same.logprobs, exact)).max() > 0.01


@pytest.mark.parametrize("published", [UNTIED], indirect=True, ids=["untied"])
def test_a_checkpoint_is_what_init_from_takes(jorch, published, mesh, tmp_path):
    """In any dtype."""
    folder, _ = published
    jorch("import", "--from", folder, "--out", tmp_path / "ckpt", "--dtype", "bfloat16")
    loaded = pretrained.load(str(tmp_path / "ckpt"), mesh, param_dtype="float32")
    direct = pretrained.load(str(folder), mesh, param_dtype="bfloat16")
    assert loaded.tokenizer.digest == direct.tokenizer.digest
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype("float32")), loaded.params, direct.params)


@pytest.mark.parametrize("published", [UNTIED], indirect=True, ids=["untied"])
def test_a_failed_import_leaves_nothing(jorch, published, tmp_path):
    folder, _ = published
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    part = broken / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    line = jorch("import", "--from", broken, "--out", tmp_path / "ckpt", status=2)
    assert line.startswith(f"jorch: error: {part}: not readable as safetensors (")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000])
def test_several_files_hold_what_their_index_says(max_shard_bytes, published, mesh, tmp_path):
    folder, _ = published
    start = pretrained.load(str(folder), mesh, param_dtype=tensors.stored_dtype(folder))
    tensors.save(tmp_path, Held(start.params), max_shard_bytes)
    index = json.loads((tmp_path / tensors.INDEX).read_text())
    assert stored(tmp_path) == stored(folder)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in stored(folder).values())
    found = {name: path.name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    for path in tmp_path.glob("*.safetensors"):
        parts = load_file(path)
        assert len(parts) == 1 or sum(t.nbytes for t in parts.values()) <= max_shard_bytes


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_is_read_and_has_its_number_of_parameters(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(size)))
    config, published = hf.load_config(tmp_path), SIZES[size]
    assert config == PUBLISHED[size], "what a plan takes without the file"
    model = Qwen3(config)
    assert model.num_params() == published.num_params
    assert round(model.num_params() / 1e9, 1) == published.billions
    num_embedded = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    digits = len(str(published.billions_without_embedding).partition(".")[2])
    rest = (model.num_params() - num_embedded) / 1e9
    assert round(rest, digits) == published.billions_without_embedding


def test_verify_says_what_it_lacks(jorch, tmp_path):
    line = jorch("verify", BASE, "--against", BASE, "--python", tmp_path / "nowhere", status=2)
    assert line == f"jorch: error: --python {tmp_path / 'nowhere'}: No such file or directory"


SHARDED = """
import sys
from pathlib import Path
from jorch.sections import MeshConfig
from jorch.export import pretrained, tensors
from jorch.export.source import Held
from jorch.sharding import make_mesh

folder, out = sys.argv[1:]
mesh = make_mesh(MeshConfig(tensor=2, fsdp=2, context=2))
start = pretrained.load(folder, mesh, param_dtype=tensors.stored_dtype(Path(folder)))
gate = start.params["layers"]["gate"]
assert gate.addressable_shards[0].data.size * 4 == gate.size
tensors.save(Path(out), Held(start.params))
"""


@pytest.mark.slow
@pytest.mark.parametrize("published", [UNTIED], indirect=True, ids=["untied"])
def test_eight_devices_read_and_write_the_same_tensors(published, tmp_path):
    folder, _ = published
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(folder), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert stored(tmp_path) == stored(folder)
