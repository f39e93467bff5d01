"""An export's host memory does not grow with the number of layers."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jorch.export import weights
from jorch.model.transformer import Qwen3
from jorch.sections import ModelConfig
from jorch.synth.sft import train_tokenizer

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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_thirty_layers_take_no_more_than_three(mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    """All of them would be 30 times as much; two layers are the allowance."""
    tokenizer = train_tokenizer()
    peaks, layer_bytes = [], 0
    for num_layers in (3, 30):
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=num_layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
        )
        shapes = Qwen3(config).abstract_params()
        params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
        layer_bytes = sum(x.nbytes for x in jax.tree.leaves(params["layers"])) // num_layers
        weights.save(tmp_path / f"{num_layers}", config, params, tokenizer)
        del params
        peaks.append(peak_bytes(tmp_path / f"{num_layers}", tmp_path / f"out-{num_layers}"))
    assert layer_bytes > 2**23
    assert peaks[1] - peaks[0] < 2 * layer_bytes
