"""The process that plays rollouts beside the trainer: `python -m jorch.rl.rollout_worker FD`.

It gets a Job over the connection, then NewWeights and Play in the order in which they take effect, and answers each
group with Played. It ends when the connection closes: with the trainer, however that dies.
"""

import asyncio
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from jorch.data import tokenizer as tokenizers
from jorch.data.chat import render_observation
from jorch.export import hf, pretrained
from jorch.model.transformer import Qwen3
from jorch.rl.rollout_process import Failed, Job, Loaded, NewWeights, Play, Played
from jorch.rollout.driver import Driver
from jorch.rollout.jax_sampler import JaxSampler
from jorch.rollout.sampler import Sampler
from jorch.rollout.tool_client import ToolClient
from jorch.rollout.vllm_sampler import VllmSampler
from jorch.sections import MeshConfig, computation
from jorch.serving.samplers import Weights, weights_folder
from jorch.sharding import make_mesh
from jorch.types import Task


def main(descriptor: int) -> None:
    connection = Connection(descriptor)
    try:
        job, version = connection.recv()
        asyncio.run(_play(connection, job, version))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer is gone
    except Exception as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        line = " ".join(str(error).split())
        with suppress(OSError):
            connection.send(Failed(type(error).__name__, line, traceback.format_exc()))
        sys.exit(1)


async def _play(connection: Connection, job: Job, version: int) -> None:
    """Until the trainer closes the connection."""
    config, rollout = job.config, job.config.rollout
    start = _architecture(job)
    weights = Weights(start, weights_folder(config.sampler, job.folder), config.sampler)
    with closing(_make_sampler(job, start, version, weights)) as sampler:
        async with ToolClient(job.url, timeout_s=rollout.call_timeout_s, retries=rollout.call_retries) as tools:
            driver = Driver(sampler, tools, start.tokenizer, config.chat, rollout)
            sampler.warm_up(len(start.tokenizer.encode(render_observation(["output"], config.chat.style))))

            async def play(number: int, task: Task, ids: list[str]) -> None:
                trajectories = await driver.run_group(task, ids, config.seed, rollout.temperature)
                connection.send(Played(number, trajectories, sampler.stats.busy_s))

            async with sampler.connected(), asyncio.TaskGroup() as running:
                playing: set[asyncio.Task[None]] = set()
                with _messages(connection) as inbox:
                    while (message := await inbox.get()) is not None:
                        if isinstance(message, NewWeights):
                            began = time.perf_counter()
                            await asyncio.to_thread(weights.load, message.folder, message.version, sampler)
                            connection.send(Loaded(time.perf_counter() - began))
                        else:
                            for number, task, ids in _announce(message, driver, config.group_size):
                                playing.add(coroutine := running.create_task(play(number, task, ids)))
                                coroutine.add_done_callback(playing.discard)
                for coroutine in playing:
                    coroutine.cancel()


def _architecture(job: Job) -> pretrained.Pretrained:
    """The model without parameters, which come with each version."""
    folder, config = job.folder / hf.ARCHITECTURE, job.config
    architecture = hf.load_config(folder, **computation(config))
    return pretrained.Pretrained(Qwen3(architecture), {}, tokenizers.load_folder(folder))


def _make_sampler(job: Job, start: pretrained.Pretrained, version: int, weights: Weights) -> Sampler:
    sampler, stop_id = job.config.sampler, start.tokenizer.end_of_turn_id
    if sampler.vllm is not None:
        # The trainer has given these servers the weights of this version.
        return VllmSampler(sampler, job.urls, stop_id, weights.write, weights.push, policy_version=version)
    return JaxSampler(
        start.model,
        hf.load(job.weights, start.model, make_mesh(MeshConfig())),
        sampler,
        max_tokens=job.config.rollout.max_tokens_per_turn,
        stop_id=stop_id,
        batches=job.config.max_policy_lag + 1,
        policy_version=version,
    )


def _announce(message: Play, driver: Driver, group_size: int) -> Iterator[tuple[int, Task, list[str]]]:
    """(number, task, trajectory ids) of each group. The sampler batches what is announced together: a step's groups."""
    ids = {
        number: [f"group-{number}/{task.task_id}/{i}" for i in range(group_size)]
        for number, task in message.tasks.items()
    }
    driver.announce(list(ids.values()))
    return ((number, task, ids[number]) for number, task in message.tasks.items())


@contextmanager
def _messages(connection: Connection) -> Iterator[asyncio.Queue[Any]]:
    """What the trainer sends, in order; None at the end."""
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def receive() -> None:
        try:
            inbox.put_nowait(connection.recv())
        except (EOFError, OSError):
            loop.remove_reader(connection.fileno())
            inbox.put_nowait(None)

    loop.add_reader(connection.fileno(), receive)
    try:
        yield inbox
    finally:
        loop.remove_reader(connection.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
