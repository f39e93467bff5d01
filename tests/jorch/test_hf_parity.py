"""Our logits against Hugging Face transformers' Qwen3, on tiny random models, in both directions.

transformers and torch need not be where jax is: JORCH_HF_PYTHON names an interpreter that has them.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jorch.export import hf
from jorch.model.transformer import Qwen3
from jorch.synth.sft import train_tokenizer

KINDS = {"tied": True, "untied": False}
TOKEN_IDS = np.random.default_rng(0).integers(0, 640, (2, 40)).astype(np.int64)
# Both sides add the same float32 numbers in another order.
TOLERANCE = 1e-4

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

folder = Path(sys.argv[1])
token_ids = torch.from_numpy(np.load(folder / "token_ids.npy"))

def write_logits(kind, model):
    with torch.no_grad():
        np.save(folder / kind / "logits.npy", model.eval()(token_ids).logits.numpy())

for kind in ("tied", "untied"):
    write_logits(f"ours-{kind}", Qwen3ForCausalLM.from_pretrained(folder / f"ours-{kind}", dtype=torch.float32))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=kind == "tied", rope_theta=10000.0,
        rms_norm_eps=1e-5, initializer_range=0.3, max_position_embeddings=128,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.7, 1.4)
    model.save_pretrained(folder / f"theirs-{kind}")
    write_logits(f"theirs-{kind}", model)
"""


def interpreter() -> str:
    python = os.environ.get("JORCH_HF_PYTHON", sys.executable)
    # Not from the repository: its folder `kernels` would hide Hugging Face's package of that name.
    check = subprocess.run([python, "-c", "import torch, transformers"], cwd="/", capture_output=True, text=True)
    if check.returncode:
        pytest.skip(f"{python} lacks torch or transformers ({check.stderr.strip().splitlines()[-1]}): JORCH_HF_PYTHON")
    return python


@pytest.fixture(scope="module")
def folder(tiny_config, random_params, tmp_path_factory) -> Path:
    python = interpreter()
    folder = tmp_path_factory.mktemp("parity")
    np.save(folder / "token_ids.npy", TOKEN_IDS)
    for kind, tied in KINDS.items():
        model = Qwen3(tiny_config(vocab_size=640, num_hidden_layers=3, tie_word_embeddings=tied))
        hf.save(folder / f"ours-{kind}", model.config, random_params(model), train_tokenizer())
    result = subprocess.run([python, "-c", PROGRAM, str(folder)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_logits_equal_transformers(whose, kind, folder, mesh):
    """`ours`: written by hf.save, read by transformers; `theirs`: the other way round."""
    source = folder / f"{whose}-{kind}"
    model = Qwen3(hf.load_config(source))
    assert model.config.tie_word_embeddings == KINDS[kind]
    module = model.bind(hf.load(source, model, mesh))
    B, T = TOKEN_IDS.shape
    hidden = module.hidden(jnp.asarray(TOKEN_IDS), jnp.tile(jnp.arange(T), (B, 1)), jnp.full((B, T), T))
    expected = np.load(source / "logits.npy")
    assert np.abs(expected).max() > 1, "logits too small to compare"
    np.testing.assert_allclose(module.logits(hidden), expected, rtol=0, atol=TOLERANCE)
