"""One run in several processes, on one machine or on many: how they find each other, who writes, how they part.

Every process runs the same program on the same global arrays (jax.distributed). Process 0 alone writes metrics,
exports and what a person reads; Orbax lets each process write its own shards of a checkpoint. The run folder must be
on a file system that all processes see.
"""

import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from pydantic import BaseModel

from jorch.run_folder import naming, open_run_folder

HEARTBEAT_TIMEOUT_S = 30
"""A process that says nothing for this long is dead: the others stop."""

SHUTDOWN_TIMEOUT_S = 10
"""How long a process that failed waits for the others before it goes. After a success they have met already."""


def join(place: str) -> None:
    """Become process RANK of COUNT; call it before anything touches a device.

    Args:
        place: "RANK/COUNT@HOST:PORT", where process 0 listens; or "auto": as Slurm, Kubernetes or the TPU says.

    Raises ValueError where `place` is neither.
    """
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    if place == "auto":
        initialize()
    else:
        rank, count, address = _parse(place)
        initialize(address, count, rank)
    if not is_writer():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def _parse(place: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"(\d+)/(\d+)@(.+:\d+)", place)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(f"--process {place!r}: write RANK/COUNT@HOST:PORT with RANK below COUNT, or auto")
    return int(found[1]), int(found[2]), found[3]


def is_writer() -> bool:
    """Whether this process writes the run's logs and exports: exactly one does."""
    return jax.process_index() == 0


@contextmanager
def open_shared_run_folder(config: BaseModel, *, resume: bool, fresh: bool) -> Iterator[Path]:
    """`open_run_folder` by process 0; the others enter after it, and all leave together.

    Raises as `open_run_folder` does, in process 0.
    """
    if not is_writer():
        _meet("the run folder is open")
        yield Path(getattr(config, "out"))  # noqa: B009 (every stage's config has it)
    else:
        with open_run_folder(config, resume=resume, fresh=fresh) as folder:
            _meet("the run folder is open")
            yield folder
    _meet("the run has ended")


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def own_folder(folder: Path) -> Path:
    """Where this process alone may write in a run folder: the folder itself, where there is no other process."""
    if jax.process_count() == 1:
        return folder
    own = folder / "processes" / str(jax.process_index())
    with naming(own):
        own.mkdir(parents=True, exist_ok=True)
    return own


def own_address(url: str) -> str:
    """`url`, with this process's number for "{process}"."""
    return url.replace("{process}", str(jax.process_index()))


def own_share(count: int, key: str) -> slice:
    """Which of `count` things this process takes on. Raises ValueError, naming `key`, where the shares are uneven."""
    num_processes = jax.process_count()
    if count % num_processes:
        raise ValueError(f"{key}={count} is no multiple of the {num_processes} processes that share it")
    size = count // num_processes
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def gather(part: list[Any]) -> list[Any]:
    """The parts of all processes, joined in their order. Every process must call it."""
    if jax.process_count() == 1:
        return part
    # Pickle: what comes in was made by the same program, in the same job.
    content = np.frombuffer(pickle.dumps(part), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    parts = (pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True))
    return [item for found in parts for item in found]


def check_agreement(what: str, own: str) -> None:
    """Raises ValueError where processes do not have the same to say; every process must call it, and all raise."""
    everyone = gather([own])
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise ValueError(
                f"{what} differs between processes, which would wait for each other for ever: process 0 has "
                f"{everyone[0]!r}, process {rank} has {other!r}; run on equal devices, and look at that one"
            )


def to_host(tree: Any) -> Any:
    """Whole arrays of a pytree whose shards lie on several processes, in every process's memory.

    Every process must call it. With one process the arrays stay where they are.
    """
    return tree if jax.process_count() == 1 else jax.tree.map(_whole, tree)


def _whole(array: jax.Array) -> Any:
    return multihost_utils.process_allgather(array, tiled=True)
