"""One run in several processes, on one machine or on many: how they find each other, who writes, how they part.

Every process runs the same program on the same global arrays (jax.distributed). Process 0 alone writes metrics,
exports and what a person reads; Orbax lets each process write its own shards of a checkpoint. The run folder must be
on a file system that all processes see.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from pydantic import BaseModel

from jorch.run_folder import open_run_folder

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


def to_host(tree: Any) -> Any:
    """Whole arrays of a pytree whose shards lie on several processes, in every process's memory.

    Every process must call it. With one process the arrays stay where they are.
    """
    return tree if jax.process_count() == 1 else jax.tree.map(_whole, tree)


def _whole(array: jax.Array) -> Any:
    return multihost_utils.process_allgather(array, tiled=True)
