"""An export's host memory does not grow with the number of layers."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml

from jorch.checkpoint import Checkpoints, base_meta, describe
from jorch.config import SftConfig
from jorch.export import hf, weights
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Params, Qwen3, Trainable
from jorch.sections import LoraConfig, ModelConfig
from jorch.synth.sft import train_tokenizer
from jorch.train.optimizer import make_optimizer
from jorch.train.state import init_state

SCRIPT = "import sys; from jorch.cli import main; sys.exit(main())"


def peak_bytes(checkpoint: Path, out: Path) -> int:
    """Of anonymous memory, while `jorch export` runs; pages of mapped files, which the kernel may drop, apart."""
    command = [sys.executable, "-c", SCRIPT, "export", str(checkpoint), "--out", str(out)]
    child = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    peak_kib = 0
    while child.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
        peak_kib = max(peak_kib, int(found[1]) if found else 0)
        time.sleep(0.005)
    assert child.returncode == 0
    return peak_kib * 1024


def model_of(num_layers: int) -> tuple[ModelConfig, Params]:
    config = ModelConfig(
        vocab_size=train_tokenizer().vocab_size,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return config, jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), Qwen3(config).abstract_params())


def save_weights(folder: Path, config: ModelConfig, params: Params, mesh: jax.sharding.Mesh) -> None:
    weights.save(folder, config, params, train_tokenizer())


def save_run(folder: Path, config: ModelConfig, params: Params, mesh: jax.sharding.Mesh) -> None:
    """What behaviour cloning of the whole model leaves after a step."""
    write_run(folder, config, mesh, Qwen3(config), params, {"model": config.model_dump()}, {})


def save_adapter_run(folder: Path, config: ModelConfig, params: Params, mesh: jax.sharding.Mesh) -> None:
    """The same of an adapter, whose base lies in safetensors."""
    base = folder.with_name(f"base-{folder.name}")
    hf.save(base, config, params, train_tokenizer())
    model = LoraQwen3(Qwen3(config), LoraConfig(rank=8))
    settings = {"init_from": str(base), "lora": model.lora.model_dump()}
    write_run(folder, config, mesh, model, model.init(jax.random.key(0), mesh), settings, base_meta(str(base), params))


def write_run(
    folder: Path,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    trained: Trainable,
    params: Params,
    settings: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    tokenizer = train_tokenizer()
    content = settings | {
        "out": str(folder),
        "demonstrations": "miniature",
        "steps": 1,
        "batch": {"row_tokens": 8, "micro_rows": 1},
        "optimizer": {"learning_rate": 1.0},
    }
    run = SftConfig.model_validate(content)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    hf.save_architecture(folder, config, tokenizer)
    state = init_state(trained, make_optimizer(run.optimizer, 1), mesh, params)
    with Checkpoints(folder / "checkpoints", run.checkpoint) as checkpoints:
        checkpoints.save(1, state, describe(run, config, tokenizer.digest) | meta, force=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize(("save", "most"), [(save_weights, 30), (save_run, 15), (save_adapter_run, 15)])
def test_many_layers_take_no_more_than_three(save: Any, most: int, mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    """All of them would be 5 or 10 times as much, an optimizer's state the double on top; two are the allowance."""
    peaks, layer_bytes = [], 0
    for num_layers in (3, most):
        config, params = model_of(num_layers)
        layer_bytes = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) // num_layers
        save(tmp_path / f"{num_layers}", config, params, mesh)
        del params
        peaks.append(peak_bytes(tmp_path / f"{num_layers}", tmp_path / f"out-{num_layers}"))
    assert layer_bytes > 2**23
    assert peaks[1] - peaks[0] < 2 * layer_bytes
