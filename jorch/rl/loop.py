"""The RL stage: rollouts, group rewards, packing, one policy update, new weights to the sampler; and again.

The whole of a step is a function of (config, step, state): tasks, sampling noise and order derive from the seed and the
step's number. So a resumed run repeats exactly what an uninterrupted one would have done. With `max_policy_lag` the
rollouts go on beside the updates (`rollout_process.py`): which weights draw which token then depends on time, and a
resumed run goes on from the same state and the same number of groups, but not bit by bit.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jorch.checkpoint import Checkpoints, check_base, describe
from jorch.config import RlConfig
from jorch.data.chat import render_observation
from jorch.data.packing import fill_fraction, pack
from jorch.data.tasks import TaskStream, read_jsonl
from jorch.export import hf, pretrained
from jorch.export.adapter import Adapter
from jorch.export.probe import Probe, make_probe_fn
from jorch.model import lora
from jorch.model.attention import chosen_paths
from jorch.model.transformer import Params, Trainable
from jorch.processes import (
    check_agreement,
    gather,
    is_writer,
    open_shared_run_folder,
    own_address,
    own_folder,
    own_share,
    to_host,
)
from jorch.rl import log_ratios
from jorch.rl.advantages import keeps_group
from jorch.rl.losses import policy_loss
from jorch.rl.records import Records
from jorch.rl.report import rollout_metrics
from jorch.rl.rewards import is_scorable, score_group
from jorch.rl.rollout_process import Job, RolloutProcess
from jorch.rl.samples import from_group
from jorch.rollout.driver import Driver, probe
from jorch.rollout.sampler import Sampler
from jorch.rollout.server_process import tool_server
from jorch.rollout.tool_client import ToolClient
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.sections import ServerSection, computation
from jorch.serving.samplers import Weights, make_sampler, weights_folder
from jorch.sharding import make_mesh, shard_batch
from jorch.train.optimizer import make_optimizer
from jorch.train.speed import Work, speed, split, work_of
from jorch.train.state import TrainState, abstract_state, init_state
from jorch.train.step import TrainStep, make_logprobs_fn, make_train_step
from jorch.types import Group, PackedBatch, Sample, Task, Trajectory


class Packed(NamedTuple):
    """One optimizer update's samples."""

    batch: PackedBatch
    """On the mesh."""
    num_sequences: float
    fill: float
    """Share of its positions that hold a token."""
    work: Work


@dataclass
class Learner:
    """The trainer's side of a step: groups in, an updated state and metrics out."""

    config: RlConfig
    mesh: Mesh
    model: Trainable
    frozen: Params | None
    """Parameters that are not trained: the base of an adapter, or None."""
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    logprobs_fn: Any
    state: TrainState
    reference: Any
    """Trained parameters as they began, the KL penalty's frozen policy; None where there is no penalty."""
    skipped_in_a_row: int = 0

    def published(self, sampler: Sampler) -> Any:
        """What `sampler` is given, in host memory: the adapter alone where it holds the base."""
        if not sampler.takes_adapters:
            return to_host(self.params)
        assert self.config.lora is not None
        assert self.frozen is not None
        return Adapter(to_host(self.state.params), self.config.lora, self.probe_fn(self.state.params, self.frozen))

    @cached_property
    def probe_fn(self) -> Callable[[Params, Params], Probe]:
        assert self.config.lora is not None
        return make_probe_fn(self.model.config, self.config.lora, self.mesh)

    @property
    def params(self) -> Params:
        """Of the whole model: what samplers and exports take."""
        return self.model.merge(self.state.params, self.frozen)

    def update(
        self, step: int, tasks: list[Task], trajectories: list[list[Trajectory]]
    ) -> tuple[dict[str, float], list[Group]]:
        """Score the groups of `tasks` and train once on those that are kept, in `num_minibatches` optimizer updates.

        Metrics and the scored groups, kept or not. Groups of which half is lost are left out.
        """
        began, config = time.perf_counter(), self.config
        groups = [
            score_group(task, [t for t in siblings if not t.lost], config.reward, config.algorithm)
            for task, siblings in zip(tasks, trajectories, strict=True)
            if is_scorable(siblings)
        ]
        kept = [g for g in groups if keeps_group(g.rewards, config.algorithm.min_group_std)]
        samples = [s for group in kept for s in from_group(group, config.algorithm)]
        batches = [self._pack(part) for part in _split(samples, config.num_minibatches) if part]
        pack_ended = time.perf_counter()
        totals: list[dict[str, jax.Array]] = []
        for packed in batches:
            self.state, metrics = self.train_step(self.state, packed.batch, packed.num_sequences, self.frozen)
            totals.append(metrics)
        counts = sum(np.asarray(metrics.pop(log_ratios.COUNTS), np.float64) for metrics in totals)
        means = {name: float(np.mean([float(m[name]) for m in totals])) for name in (totals or [{}])[0]}
        self._check_finite(means, step)
        learn_s = time.perf_counter() - pack_ended
        metrics = (
            means
            | self._speed(batches, learn_s)
            | log_ratios.quantiles(counts)
            | rollout_metrics(step, groups, [t for siblings in trajectories for t in siblings])
        )
        return metrics | {
            "group/dropped_fraction": 1.0 - len(kept) / len(tasks),
            "samples/trained": float(sum(s.num_copies for s in samples)),
            "samples/distinct": float(len(samples)),
            "packing/fill": float(np.mean([packed.fill for packed in batches])) if batches else 0.0,
            "time/pack_s": pack_ended - began,
            "time/learn_s": learn_s,
        }, groups

    def _pack(self, samples: list[Sample]) -> Packed:
        shape = self.config.batch
        num_micro = -(-self.config.tasks_per_step * self.config.group_size // shape.micro_rows)
        batch = pack(samples, row_tokens=shape.row_tokens, micro_rows=shape.micro_rows, num_micro=num_micro)
        fill, work = fill_fraction(batch), work_of(batch)
        batch = shard_batch(self.mesh, batch)
        if self.config.num_minibatches > 1:
            # Taken before the first update, so that every minibatch's ratio is to the same policy.
            batch = batch._replace(old_logprobs=self.logprobs_fn(self.state.params, batch, self.frozen))
        if self.reference is not None:
            batch = batch._replace(ref_logprobs=self.logprobs_fn(self.reference, batch, self.frozen))
        return Packed(batch, float(sum(s.num_copies for s in samples)), fill, work)

    def _speed(self, batches: list[Packed], learn_s: float) -> dict[str, float]:
        """Of the updates alone, without what rollouts and scoring compute; nothing where all groups were dropped."""
        if not batches:
            return {}
        work = Work(*np.sum([packed.work for packed in batches], axis=0).tolist())
        return speed(self.model.config, work, learn_s, self.config.peak_flops, self.config.lora)

    def _check_finite(self, metrics: dict[str, float], step: int) -> None:
        """Stop after too many consecutive skipped updates."""
        skipped = metrics.get("train/skipped", 0.0) > 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        limit = self.config.optimizer.max_nonfinite_steps
        if self.skipped_in_a_row >= limit:
            raise FloatingPointError(
                f"step {step}: the gradient was not finite {limit} times in a row "
                f"(loss {metrics['train/loss']}); lower optimizer.learning_rate"
            )


def run(config: RlConfig, *, resume: bool, fresh: bool) -> None:
    """Train to `config.steps`, then export to OUT/model. Raises ValueError for what a user can mend.

    Of several processes each plays its share of a step's tasks, with a sampler of its own and the tool server that its
    address names or one of its own; all then take the same step on all of them.
    """
    own_share(config.tasks_per_step, "tasks_per_step")
    with open_shared_run_folder(config, resume=resume, fresh=fresh) as folder:
        tasks, own = read_jsonl(Path(config.tasks)), own_folder(folder)
        with tool_server(_own_server(config.tools_server), own / "tools_server.log") as url:
            asyncio.run(_probe(config, tasks, url))
            mesh = make_mesh(config.mesh)
            start = pretrained.load(config.init_from, mesh, **computation(config))
            sampler = make_sampler(
                config.sampler, config.rollout, replace(start, params=to_host(start.params)), own, config.lora
            )
            with closing(sampler):
                learner = make_learner(config, mesh, start)
                start = start.without_params()  # the learner and the sampler have what they need of them
                train(config, folder, tasks, start, learner, sampler, url)
        print(f"model: {folder / 'model'}")


def _own_server(section: ServerSection) -> ServerSection:
    """The section with this process's number in its address."""
    return section if section.url is None else section.model_copy(update={"url": own_address(section.url)})


async def _probe(config: RlConfig, tasks: list[Task], url: str) -> None:
    """Find out before the weights are loaded whether the tool server is there and can play the tasks."""
    async with ToolClient(url, timeout_s=config.rollout.call_timeout_s, retries=config.rollout.call_retries) as tools:
        await probe(tools, tasks)


def train(
    config: RlConfig,
    folder: Path,
    tasks: list[Task],
    start: pretrained.Pretrained,
    learner: Learner,
    sampler: Sampler,
    url: str,
) -> None:
    """Train in an open run folder from its newest checkpoint on; the sampler ends with the final weights.

    Of `start` the model and the tokenizer are read, not the parameters.

    Raises Terminated after SIGTERM, with a checkpoint of the last step.
    """
    _check_lag(config)
    if is_writer():
        hf.save_architecture(folder, start.model.config, start.tokenizer)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        first_step, num_groups = _restore(learner, checkpoints, start)
        sampler.publish(learner.published(sampler), first_step)
        with Records(config, folder, start, learner.frozen, checkpoints, first_step) as records:
            if config.max_policy_lag:
                _train_beside_rollouts(config, folder, tasks, start, learner, sampler, records, url, num_groups)
            else:
                asyncio.run(_train(config, tasks, start, learner, sampler, records, url))
    params = to_host(learner.params)
    if is_writer():
        hf.save(folder / "model", start.model.config, params, start.tokenizer)


def _check_lag(config: RlConfig) -> None:
    if config.max_policy_lag and jax.process_count() > 1:
        raise ValueError(f"max_policy_lag={config.max_policy_lag} needs a trainer of one process: set it to 0")
    if config.max_policy_lag and config.sampler.vllm is None and jax.default_backend() != "cpu":
        raise ValueError(
            f"max_policy_lag={config.max_policy_lag}: two processes cannot share an accelerator; sample with vLLM "
            "(sampler.vllm), or set max_policy_lag=0"
        )


def make_learner(config: RlConfig, mesh: Mesh, start: pretrained.Pretrained) -> Learner:
    algorithm = config.algorithm
    check_agreement("attention", "; ".join(chosen_paths(start.model.config, config.batch.row_tokens, mesh)))
    optimizer = make_optimizer(config.optimizer, config.steps * config.num_minibatches)
    loss_fn = partial(policy_loss, config=algorithm, on_policy=config.num_minibatches == 1)
    model, params, frozen = lora.start(start.model, start.params, config.lora, config.seed, mesh)
    return Learner(
        config,
        mesh,
        model,
        frozen,
        optimizer,
        make_train_step(model, optimizer, loss_fn, mesh, with_entropy=algorithm.entropy_coefficient > 0),
        make_logprobs_fn(model, mesh),
        init_state(model, optimizer, mesh, params),
        params if algorithm.kl_coefficient > 0 else None,
    )


def _restore(learner: Learner, checkpoints: Checkpoints, start: pretrained.Pretrained) -> tuple[int, int]:
    """Continue from the newest checkpoint, if there is one: the step to go on with, and groups used up so far."""
    if checkpoints.latest_step() is None:
        return 0, 0
    config = learner.config
    wanted = abstract_state(learner.model, learner.optimizer, learner.mesh)
    here = describe(config, start.model.config, start.tokenizer.digest)
    learner.state, meta, step = checkpoints.restore(wanted, here)
    check_base(meta, config.init_from, learner.frozen)
    return step, meta["data_position"]


def _train_beside_rollouts(
    config: RlConfig,
    folder: Path,
    tasks: list[Task],
    start: pretrained.Pretrained,
    learner: Learner,
    sampler: Sampler,
    records: Records,
    url: str,
    num_groups: int,
) -> None:
    """Updates here, rollouts in a process of their own; `sampler` gets the final weights only."""
    first_step = records.first_step
    urls = sampler.urls if isinstance(sampler, VllmSampler) else ()
    weights = Weights(start, weights_folder(config.sampler, folder), config.sampler)
    job = Job(config, folder, url, tuple(urls), weights.write(learner.published(sampler), first_step))
    with RolloutProcess(job, TaskStream(tasks, 1, config.seed), first_step, num_groups) as rollouts:
        records.begin(learner.state, num_groups)
        for step in range(first_step, config.steps):
            began = time.perf_counter()
            taken, trajectories, queue_metrics = rollouts.take(step)
            data_s = time.perf_counter() - began
            metrics, groups = learner.update(step, taken, trajectories)
            rollouts.publish(weights.write(learner.published(sampler), step + 1), step + 1)
            metrics |= queue_metrics | _step_times(metrics, time.perf_counter() - began, data_s)
            records.write(step, learner.state, metrics, groups, rollouts.num_used)
    sampler.publish(learner.published(sampler), config.steps)


async def _train(
    config: RlConfig,
    tasks: list[Task],
    start: pretrained.Pretrained,
    learner: Learner,
    sampler: Sampler,
    records: Records,
    url: str,
) -> None:
    stream = TaskStream(tasks, config.tasks_per_step, config.seed)
    async with ToolClient(url, timeout_s=config.rollout.call_timeout_s, retries=config.rollout.call_retries) as tools:
        driver = Driver(sampler, tools, start.tokenizer, config.chat, config.rollout)
        sampler.warm_up(len(start.tokenizer.encode(render_observation(["output"], config.chat.style))))
        records.begin(learner.state, records.first_step * config.tasks_per_step)
        for step in range(records.first_step, config.steps):
            metrics, groups = await take_step(config, step, stream.batch(step), driver, sampler, learner)
            records.write(step, learner.state, metrics, groups, (step + 1) * config.tasks_per_step)


async def take_step(
    config: RlConfig, step: int, tasks: list[Task], driver: Driver, sampler: Sampler, learner: Learner
) -> tuple[dict[str, float], list[Group]]:
    """One policy update; its metrics and the scored groups, kept or not."""
    began = time.perf_counter()
    busy_s = sampler.stats.busy_s
    share = own_share(len(tasks), "tasks_per_step")
    played = await driver.run_groups(
        tasks[share],
        config.group_size,
        run_id=f"step-{step}",
        seed=config.seed,
        temperature=config.rollout.temperature,
        first_position=share.start,
    )
    trajectories = gather(played)
    rolled_out = time.perf_counter()
    metrics, groups = learner.update(step, tasks, trajectories)
    sampler.publish(learner.published(sampler), step + 1)
    sample_s = sampler.stats.busy_s - busy_s
    metrics |= _step_times(metrics, time.perf_counter() - began, rolled_out - began)
    metrics |= {
        "time/sample_s": sample_s,
        "time/tools_s": rolled_out - began - sample_s,
    }
    return metrics, groups


def _step_times(metrics: dict[str, float], step_s: float, rollouts_s: float) -> dict[str, float]:
    """A step's time and its parts, with those that `Learner.update` has measured."""
    return split(step_s, data_s=rollouts_s + metrics["time/pack_s"], compute_s=metrics["time/learn_s"])


def _split(samples: list[Sample], num_parts: int) -> list[list[Sample]]:
    bounds = np.linspace(0, len(samples), num_parts + 1).round().astype(int)
    return [samples[a:b] for a, b in itertools.pairwise(bounds)]
