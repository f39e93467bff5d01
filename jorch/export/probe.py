"""The probe: token ids and the trainer's own float32 log-probabilities for them, in a folder's `jorch.json`.

A server that scores it otherwise does not compute the trainer's model, whatever its health says: stale weights, a tied
head left behind, a wrong rotary base.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jorch.export.source import Source
from jorch.model.attention import packed_rows
from jorch.model.layers import rms_norm, rope_tables
from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Params, Qwen3
from jorch.processes import to_host
from jorch.sections import CONTEXT_TOKENS, LoraConfig, ModelConfig

FILE = "jorch.json"
NUM_TOKENS = 32
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats. Another implementation differs by about 1e-5 in float32 and 0.05 in bfloat16; another model by 0.5 and more."""


@dataclass(frozen=True)
class Probe:
    """logprobs[i] belongs to token_ids[i + 1] after those before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def make_probe(config: ModelConfig, source: Source) -> Probe:
    """Score random tokens in float32, a layer and a block of the vocabulary at a time."""
    tokens = _tokens(config)
    layer = _layer(config.model_dump_json())
    with jax.default_matmul_precision("highest"):  # accelerators would round float32 inputs otherwise
        x_TD = _embed(source, tokens)
        for index in range(config.num_hidden_layers):
            params = {name: source.tensor(name, index) for name in source.shapes["layers"]}
            x_TD = jax.block_until_ready(layer(params, x_TD))
        [norm_D] = source.rows("final_norm")
        hidden_TD = rms_norm(x_TD[:-1], norm_D, config.rms_norm_eps)
        logprobs = _logprobs(source.rows("embed" if config.tie_word_embeddings else "unembed"), hidden_TD, tokens[1:])
    return Probe(tuple(tokens.tolist()), tuple(logprobs.tolist()))


def make_probe_fn(config: ModelConfig, lora: LoraConfig, mesh: Mesh) -> Callable[[Params, Params], Probe]:
    """(adapter, base) -> the probe of both together, computed where they lie; in float32, whatever `config` has."""
    exact = {"compute_dtype": "float32", "logit_dtype": None, "remat": "none"}
    model = LoraQwen3(Qwen3(config.model_copy(update=exact)), lora)
    tokens = _tokens(config)
    B, part = mesh.shape["data"] * mesh.shape["fsdp"], CONTEXT_TOKENS * mesh.shape["context"]
    T = -(-NUM_TOKENS // part) * part
    filled = np.arange(T) < NUM_TOKENS
    ids_T = np.zeros(T, np.int32)
    ids_T[:NUM_TOKENS] = tokens

    @jax.jit
    def logprobs(params: Params, frozen: Params) -> jax.Array:
        ids_BT, positions_BT, ends_BT = (
            jnp.broadcast_to(x, (B, T)) for x in (ids_T, np.arange(T, dtype=np.int32), NUM_TOKENS * filled)
        )
        module = model.bind(params, frozen)
        hidden_BTD = module.hidden(ids_BT, positions_BT, ends_BT.astype(jnp.int32), mesh)
        log_p_TV = jax.nn.log_softmax(module.logits(hidden_BTD[0, : NUM_TOKENS - 1]))
        return jnp.take_along_axis(log_p_TV, tokens[1:, None], axis=1)[:, 0]

    def compute(params: Params, frozen: Params) -> Probe:
        with jax.default_matmul_precision("highest"):
            scored = np.asarray(to_host(logprobs(params, frozen)))
        return Probe(tuple(tokens.tolist()), tuple(scored.tolist()))

    return compute


def _tokens(config: ModelConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.vocab_size, NUM_TOKENS).astype(np.int32)


def _embed(source: Source, tokens: np.ndarray) -> jax.Array:
    x_TD, begin = jnp.float32(0), 0
    for rows in source.rows("embed"):
        here = (tokens >= begin) & (tokens < begin + rows.shape[0])
        own = rows[np.where(here, tokens - begin, 0)].astype(jnp.float32)
        x_TD += jnp.where(here[:, None], own, 0)
        begin += rows.shape[0]
    return x_TD


def _logprobs(blocks: Iterator[jax.Array], hidden_TD: jax.Array, targets: np.ndarray) -> np.ndarray:
    """log softmax of the targets' logits, without ever holding those of the whole vocabulary's rows."""
    total, chosen, begin = np.full(len(targets), -np.inf), np.zeros(len(targets)), 0
    for rows_VD in blocks:
        logits_TV = np.asarray(_logits(hidden_TD, rows_VD), np.float64)
        here = (targets >= begin) & (targets < begin + rows_VD.shape[0])
        own = logits_TV[np.arange(len(targets)), np.where(here, targets - begin, 0)]
        chosen = np.where(here, own, chosen)
        total = np.logaddexp(total, np.logaddexp.reduce(logits_TV, axis=1))
        begin += rows_VD.shape[0]
    return (chosen - total).astype(np.float32)


@jax.jit
def _logits(hidden_TD: jax.Array, rows_VD: jax.Array) -> jax.Array:
    return jnp.einsum("td,vd->tv", hidden_TD, rows_VD.astype(jnp.float32))


@cache
def _layer(config_json: str) -> Any:
    config = ModelConfig.model_validate_json(config_json)
    model = Qwen3(config.model_copy(update={"compute_dtype": "float32"}))

    @jax.jit
    def apply(params: Params, x_TD: jax.Array) -> jax.Array:
        T = x_TD.shape[0]
        _, [block] = model.bind_unstacked({"layers": [params]})
        rope = rope_tables(jnp.arange(T)[None], config.head_dim, config.rope_theta)
        return block(x_TD[None], rope, packed_rows(jnp.full((1, T), T), config.head_dim, None).attend)[0]

    return apply


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
