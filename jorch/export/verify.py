"""`jorch verify`: our logits of a checkpoint beside those of Hugging Face transformers on a folder."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jorch.export import pretrained
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh

NUM_ROWS, NUM_TOKENS = 2, 64

_PROGRAM = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, token_ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    np.save(logits, model(torch.from_numpy(np.load(token_ids))).logits.numpy())
"""


def run(checkpoint: Path, against: Path, python: str | None) -> None:
    """Print one JSON line: the largest difference of a logit over fixed random tokens, both sides in float32.

    `python` is an interpreter that has torch and transformers (None: this one). Raises ValueError where it lacks
    them or they refuse `against`, or the two vocabularies differ.
    """
    pretrained.folder_of(str(against), "--against")
    start = pretrained.load(str(checkpoint), make_mesh(MeshConfig()), param_dtype="float32", compute_dtype="float32")
    vocab_size = start.model.config.vocab_size
    token_ids = np.random.default_rng(0).integers(0, vocab_size, (NUM_ROWS, NUM_TOKENS))
    theirs = _transformers_logits(against.absolute(), token_ids, python or sys.executable)
    if theirs.shape[-1] != vocab_size:
        raise ValueError(f"{against} has {theirs.shape[-1]} logits, {checkpoint} {vocab_size}; not the same model")

    @jax.jit
    def logits(params: dict, token_ids_BT: jax.Array) -> jax.Array:
        module = start.model.bind(params)
        positions_BT = jnp.broadcast_to(jnp.arange(NUM_TOKENS), token_ids_BT.shape)
        return module.logits(module.hidden(token_ids_BT, positions_BT, jnp.full(token_ids_BT.shape, NUM_TOKENS)))

    # TPUs would multiply float32 matrices in bfloat16.
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(logits(start.params, jnp.asarray(token_ids, jnp.int32)))
    found = {
        "max_abs_logit_diff": float(np.abs(ours - theirs).max()),
        "max_abs_logit": float(np.abs(theirs).max()),
        "num_tokens": NUM_ROWS * NUM_TOKENS,
    }
    print(json.dumps(found))


def _transformers_logits(folder: Path, token_ids: np.ndarray, python: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        tokens, logits = Path(scratch, "token_ids.npy"), Path(scratch, "logits.npy")
        np.save(tokens, token_ids)
        command = [python, "-c", _PROGRAM, str(folder), str(tokens), str(logits)]
        try:
            # Elsewhere than here: a folder `kernels` would hide Hugging Face's package of that name.
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ValueError(f"--python {python}: {error.strerror}") from error
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{python} could not run {folder} with torch and transformers ({reason}); see --python")
        return np.load(logits)
