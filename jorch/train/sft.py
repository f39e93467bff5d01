"""Behaviour cloning of demonstrations, by the same train step as RL. `synth/sft.py` is its command."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jorch.checkpoint import Checkpoints
from jorch.config import SftConfig
from jorch.data.chat import demonstration_tokens
from jorch.data.packing import fill_fraction, pack
from jorch.data.tokenizer import Tokenizer
from jorch.metrics import MetricWriter, stage
from jorch.model.transformer import Params, Qwen3
from jorch.processes import is_writer
from jorch.sharding import shard_batch
from jorch.train.optimizer import make_optimizer
from jorch.train.state import abstract_state, init_state
from jorch.train.step import Metrics, make_train_step
from jorch.types import PackedBatch, Sample

Demonstrations = Callable[[int], list[dict[str, str]]]
"""Number of a demonstration -> its chat messages; endless, and a pure function of the number."""


def cross_entropy(
    logprobs_BT: jax.Array,
    entropy_BT: jax.Array | None,
    batch: PackedBatch,
    loss_tokens: jax.Array,
    num_sequences: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Mean negative log-probability (nats) of the demonstrated tokens, over the global batch."""
    return -jnp.sum(batch.loss_weights * logprobs_BT) / loss_tokens, {}


def train(
    config: SftConfig,
    folder: Path,
    mesh: Mesh,
    model: Qwen3,
    params: Params,
    tokenizer: Tokenizer,
    demonstrations: Demonstrations,
) -> Params:
    """Train in an open run folder, continuing from its newest checkpoint; the final parameters."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_step = make_train_step(model, optimizer, cross_entropy, mesh)
    state = init_state(model, optimizer, mesh, params)
    meta = {"tokenizer_digest": tokenizer.digest, "seed": config.seed}
    skipped_in_a_row = 0
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        first_step = 0
        if checkpoints.latest_step() is not None:
            state, restored, first_step = checkpoints.restore(abstract_state(model, optimizer, mesh))
            if restored["tokenizer_digest"] != tokenizer.digest:
                raise ValueError(f"the checkpoint in {config.out} belongs to another tokenizer")
        with (
            MetricWriter(folder, first_step) if is_writer() else contextlib.nullcontext() as writer,
            stage("behaviour cloning", config.steps) as progress,
        ):
            progress.advance(first_step)
            for step in range(first_step, config.steps):
                began = time.perf_counter()
                batch = _batch(config, step, tokenizer, demonstrations)
                packed = time.perf_counter()
                state, metrics = train_step(state, shard_batch(mesh, batch), float(config.rows_per_step))
                values = {name: float(value) for name, value in metrics.items()}
                skipped_in_a_row = skipped_in_a_row + 1 if values["train/skipped"] else 0
                if skipped_in_a_row >= config.optimizer.max_nonfinite_steps:
                    raise FloatingPointError(
                        f"step {step}: the gradient was not finite {skipped_in_a_row} times in a row"
                    )
                if writer and (step % config.log_every == 0 or step + 1 == config.steps):
                    now = time.perf_counter()
                    writer.write(
                        step,
                        values
                        | {
                            "train/perplexity": math.exp(min(values["train/loss"], 50.0)),
                            "packing/fill": fill_fraction(batch),
                            "time/pack_s": packed - began,
                            "time/learn_s": now - packed,
                            "time/step_s": now - began,
                        },
                    )
                checkpoints.save(step + 1, state, meta, force=step + 1 == config.steps)
                progress.advance(loss=values["train/loss"])
    return state.params


def _batch(config: SftConfig, step: int, tokenizer: Tokenizer, demonstrations: Demonstrations) -> PackedBatch:
    first = step * config.rows_per_step
    samples = []
    for number in range(first, first + config.rows_per_step):
        token_ids, mask = demonstration_tokens(demonstrations(number), tokenizer, config.chat.style)
        samples.append(Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), 1.0))
    num_micro = -(-config.rows_per_step // config.batch.micro_rows)
    shape = config.batch
    return pack(samples, row_tokens=shape.row_tokens, micro_rows=shape.micro_rows, num_micro=num_micro)
