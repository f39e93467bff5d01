"""The probe: token ids and the trainer's own float32 log-probabilities for them, in a folder's `jorch.json`.

A server that scores it otherwise does not compute the trainer's model, whatever its health says: stale weights, a tied
head left behind, a wrong rotary base.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jorch.config import ModelConfig
from jorch.model.transformer import Params, Qwen3

FILE = "jorch.json"
NUM_TOKENS = 32
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats. Another implementation differs by about 1e-5 in float32 and 0.05 in bfloat16; another model by 0.5 and more."""


@dataclass(frozen=True)
class Probe:
    """logprobs[i] belongs to token_ids[i + 1] after those before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def make_probe(config: ModelConfig, params: Params) -> Probe:
    """Score random tokens in float32."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, NUM_TOKENS).astype(np.int32)
    logprobs = np.asarray(_scorer(config.model_dump_json())(params, tokens))
    return Probe(tuple(tokens.tolist()), tuple(logprobs.tolist()))


@cache
def _scorer(config_json: str) -> Any:
    config = ModelConfig.model_validate_json(config_json)
    model = Qwen3(config.model_copy(update={"compute_dtype": "float32"}))

    @jax.jit
    def score(params: Params, tokens: jax.Array) -> jax.Array:
        T = tokens.shape[0]
        module = model.bind(params)
        hidden_BTD = module.hidden(tokens[None], jnp.arange(T)[None], jnp.full((1, T), T))
        logprobs_TV = jax.nn.log_softmax(module.logits(hidden_BTD[0]))
        return jnp.take_along_axis(logprobs_TV[:-1], tokens[1:, None], axis=1)[:, 0]

    return score


def write(folder: Path, probe: Probe, **facts: Any) -> None:
    """`jorch.json` with the probe and further facts (step, digest of the source)."""
    content = {**facts, "probe": {"token_ids": probe.token_ids, "logprobs": probe.logprobs}}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> Probe | None:
    """The folder's probe; None where it has none. Raises ValueError on a damaged file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())["probe"]
        return Probe(tuple(content["token_ids"]), tuple(content["logprobs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not readable ({error!r}); export the folder again") from error


def check(probe: Probe, scored: list[float], dtype: str, where: str) -> None:
    """Raises ValueError where the server's log-probabilities are not the trainer's."""
    worst = float(np.max(np.abs(np.subtract(scored, probe.logprobs))))
    if not worst <= MAX_DIFFERENCE[dtype]:
        raise ValueError(
            f"{where} does not compute the exported model: its log-probabilities of the probe differ by {worst:.3g} "
            f"nats, allowed are {MAX_DIFFERENCE[dtype]:g} in {dtype}; start it again from a fresh export"
        )
