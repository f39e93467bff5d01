"""Behaviour cloning of demonstrations, by the same train step as RL. `synth/sft.py` is its command."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jorch.checkpoint import Checkpoints, base_meta, check_base, describe
from jorch.config import SftConfig
from jorch.data.chat import demonstration_tokens
from jorch.data.packing import fill_fraction, pack
from jorch.data.tokenizer import Tokenizer
from jorch.metrics import MetricWriter, Stage, stage
from jorch.model import lora
from jorch.model.attention import chosen_paths
from jorch.model.transformer import Params, Qwen3
from jorch.processes import check_agreement, is_writer
from jorch.sharding import shard_batch
from jorch.stopping import Terminated, on_sigterm
from jorch.train.optimizer import make_optimizer
from jorch.train.speed import Clock, speed, work_of
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
    """Train in an open run folder, continuing from its newest checkpoint; the final parameters of the whole model.

    Raises Terminated after SIGTERM, with a checkpoint of the last step.
    """
    trained, start, frozen = lora.start(model, params, config.lora, config.seed, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    check_agreement("attention", "; ".join(chosen_paths(model.config, config.batch.row_tokens, mesh)))
    train_step = make_train_step(trained, optimizer, cross_entropy, mesh)
    state = init_state(trained, optimizer, mesh, start)
    meta = describe(config, model.config, tokenizer.digest) | base_meta(config.init_from, frozen)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        first_step = 0
        if checkpoints.latest_step() is not None:
            state, restored, first_step = checkpoints.restore(abstract_state(trained, optimizer, mesh), meta)
            check_base(restored, config.init_from, frozen)
        with (
            MetricWriter(folder, first_step) if is_writer() else contextlib.nullcontext() as writer,
            stage("behaviour cloning", config.steps) as progress,
            on_sigterm() as told_to_end,
        ):
            progress.advance(first_step)
            report = _Report(config, model, writer, progress)
            for step in range(first_step, config.steps):
                with report.clock.part("data"):
                    batch = _batch(config, step, tokenizer, demonstrations)
                    placed = shard_batch(mesh, batch)
                state, metrics = train_step(state, placed, float(config.rows_per_step), frozen)
                # The devices work on this step while the host reads the one before.
                report.read()
                report.dispatched(step, metrics, batch)
                ends = told_to_end(step + 1)
                is_last = step + 1 == config.steps
                if ends or is_last or checkpoints.is_due(step + 1):
                    values = report.read()  # a checkpoint promises the metrics of the steps before it
                    position = {"data_position": (step + 1) * config.rows_per_step}
                    checkpoints.save(step + 1, state, meta | position, metrics=values, force=ends or is_last)
                if ends and not is_last:
                    checkpoints.wait()
                    raise Terminated(f"stopped by SIGTERM after step {step}, which is saved")
    return trained.merge(state.params, frozen)


class _Report:
    """Reads the metrics of a dispatched step, which waits for it, and writes them down."""

    def __init__(self, config: SftConfig, model: Qwen3, writer: MetricWriter | None, progress: Stage) -> None:
        self.clock = Clock()
        self._config, self._model, self._writer, self._progress = config, model, writer, progress
        self._waiting: tuple[int, Metrics, PackedBatch] | None = None
        self._skipped_in_a_row = 0

    def dispatched(self, step: int, metrics: Metrics, batch: PackedBatch) -> None:
        """Remember a step for the next `read`."""
        self._waiting = step, metrics, batch

    def read(self) -> dict[str, float]:
        """The step's metrics. Raises FloatingPointError where too many gradients in a row were not finite."""
        if self._waiting is None:
            return {}
        (step, metrics, batch), self._waiting = self._waiting, None
        with self.clock.part("compute"):
            values = {name: float(value) for name, value in metrics.items()}
        values["train/perplexity"] = math.exp(min(values["train/loss"], 50.0))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["train/skipped"] else 0
        if self._skipped_in_a_row >= self._config.optimizer.max_nonfinite_steps:
            raise FloatingPointError(
                f"step {step}: the gradient was not finite {self._skipped_in_a_row} times in a row"
            )
        times = self.clock.lap()
        if self._writer and (step % self._config.log_every == 0 or step + 1 == self._config.steps):
            here = {"packing/fill": fill_fraction(batch)} | times
            peak, low_rank = self._config.peak_flops, self._config.lora
            here |= speed(self._model.config, work_of(batch), times["time/step_s"], peak, low_rank)
            self._writer.write(step, values | here)
        self._progress.advance(loss=values["train/loss"])
        return values


def _batch(config: SftConfig, step: int, tokenizer: Tokenizer, demonstrations: Demonstrations) -> PackedBatch:
    first = step * config.rows_per_step
    samples = []
    for number in range(first, first + config.rows_per_step):
        token_ids, mask = demonstration_tokens(demonstrations(number), tokenizer, config.chat.style)
        samples.append(Sample(token_ids, mask, np.zeros(len(token_ids), np.float32), 1.0))
    num_micro = -(-config.rows_per_step // config.batch.micro_rows)
    shape = config.batch
    return pack(samples, row_tokens=shape.row_tokens, micro_rows=shape.micro_rows, num_micro=num_micro)
