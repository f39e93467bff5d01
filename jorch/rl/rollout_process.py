"""Rollouts beside the updates: the trainer's side of the process that plays them (`rollout_worker.py`).

At any time as many groups are being played, or wait for the trainer, as `max_policy_lag` + 1 steps take. A step takes
the earliest that are ready, waits for no particular one, and drops those with a token that is too old.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from jorch.config import RlConfig
from jorch.data.tasks import TaskStream
from jorch.rl.rewards import is_scorable
from jorch.rollout.driver import all_lost
from jorch.rollout.tool_client import ToolServerDown
from jorch.rollout.vllm_sampler import SamplerDown
from jorch.types import Task, Trajectory

STOP_TIMEOUT_S = 30.0
_FAILURES: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ToolServerDown, SamplerDown, ValueError)}
"""What the process may report that is no bug: raised here as it was there."""


class Job(NamedTuple):
    """What the process is started with."""

    config: RlConfig
    folder: Path
    """The run folder, which holds the architecture."""
    url: str
    """The tool server's."""
    urls: tuple[str, ...]
    """vLLM servers; none where the process samples by itself."""
    weights: Path


class NewWeights(NamedTuple):
    """To the process: go on with these. What it is told to play later is drawn by them alone."""

    folder: Path
    version: int


class Play(NamedTuple):
    """To the process: tasks by the number of their group, the only thing from which their sampling noise derives."""

    tasks: dict[int, Task]


class Played(NamedTuple):
    """From the process: a group's siblings; `busy_s`, how long its sampler has been at work since it started."""

    number: int
    trajectories: list[Trajectory]
    busy_s: float


class Loaded(NamedTuple):
    """From the process: new weights are in, after that many seconds."""

    seconds: float


class Failed(NamedTuple):
    """From the process: its end."""

    kind: str
    """Name of the exception's class."""
    line: str
    traceback: str


@dataclass
class RolloutProcess:
    """A context manager around the process; `take` gives a step's groups, `publish` brings new weights."""

    job: Job
    stream: TaskStream
    """Of single tasks: group i plays the i-th."""
    version: int
    """Of job.weights."""
    num_used: int
    """Groups that steps took or that were dropped; a resumed run starts here, and plays again what was under way."""

    def __post_init__(self) -> None:
        self._size = self.job.config.tasks_per_step
        self._num_told = self.num_used
        self._playing: dict[int, Task] = {}
        self._ready: dict[int, Played] = {}
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._dropped: Counter[str] = Counter()
        self._lost_in_a_row: list[list[Trajectory]] = []
        self._busy_s = self._push_s = 0.0

    def __enter__(self) -> "RolloutProcess":
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jorch.rl.rollout_worker", str(theirs.fileno())]
            # Ctrl-C does not reach it, so that the run can end in order first.
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        # A thread of its own: the process must never wait until a step is over to hand over what it played.
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()
        self._send((self.job, self.version))
        return self

    def __exit__(self, *_: object) -> None:
        """The process ends with its connection, as it does when this process dies."""
        self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the receiver
        self._receiver.join()
        self._connection.close()
        self._socket.close()
        try:
            self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def publish(self, folder: Path, version: int) -> None:
        """Sample from the weights in `folder` as soon as they are read; trajectories under way go on with them."""
        self._send(NewWeights(folder, version))

    def take(self, step: int) -> tuple[list[Task], list[list[Trajectory]], dict[str, float]]:
        """Tasks and trajectories of `tasks_per_step` groups, the earliest ones that are ready, and metrics.

        Raises ToolServerDown, SamplerDown or ValueError as the rollouts did, ChildProcessError where their process is
        gone.
        """
        began, busy_s = time.perf_counter(), self._busy_s
        self._dropped.clear()
        self._refresh(step)
        while len(self._ready) < self._size:
            self._handle(self._inbox.get())
            self._refresh(step)
        numbers = sorted(self._ready)[: self._size]
        played = [self._ready.pop(number) for number in numbers]
        tasks = [self._playing.pop(number) for number in numbers]
        self.num_used += len(numbers)
        return (
            tasks,
            [group.trajectories for group in played],
            {
                "queue/ready_groups": float(len(self._ready)),
                "queue/running_groups": float(len(self._playing) - len(self._ready)),
                "queue/stale_groups": float(self._dropped["stale"]),
                "queue/lost_groups": float(self._dropped["lost"]),
                "time/wait_s": time.perf_counter() - began,
                "time/push_s": self._push_s,
                "time/sample_s": self._busy_s - busy_s,
            },
        )

    def _refresh(self, step: int) -> None:
        """Drop what is too old, and have more groups played: up to the bound within which they stay fresh enough."""
        oldest_allowed = step - self.job.config.max_policy_lag
        for number, played in list(self._ready.items()):
            versions = [t.policy_version_min for t in played.trajectories if t.policy_version_min >= 0]
            if min(versions, default=step) < oldest_allowed:
                self._drop(number, "stale")
        bound = self._size * (self.job.config.max_policy_lag + 1)
        numbers = range(self._num_told, self._num_told + bound - len(self._playing))
        if numbers:
            tasks = {number: self.stream.batch(number)[0] for number in numbers}
            self._playing |= tasks
            self._num_told = numbers.stop
            self._send(Play(tasks))

    def _handle(self, message: Any) -> None:
        match message:
            case Loaded():
                self._push_s = message.seconds
            case Played():
                self._busy_s = message.busy_s
                self._ready[message.number] = message
                lost = all(t.lost for t in message.trajectories)
                self._lost_in_a_row = [*self._lost_in_a_row, message.trajectories] if lost else []
                if not is_scorable(message.trajectories):
                    self._drop(message.number, "lost")
                if len(self._lost_in_a_row) >= self._size:
                    what = f"{self._size} groups in a row"
                    raise all_lost(self.job.url, what, self._lost_in_a_row, self.job.config.rollout.group_deadline_s)
            case Failed():
                if message.kind in _FAILURES:
                    raise _FAILURES[message.kind](message.line)
                raise RuntimeError(f"the rollout process failed:\n{message.traceback}")
            case None:
                raise ChildProcessError(f"the rollout process ended with status {self._child.wait()}")

    def _drop(self, number: int, why: str) -> None:
        del self._ready[number], self._playing[number]
        self.num_used += 1
        self._dropped[why] += 1

    def _send(self, message: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its last words are in the inbox
            self._connection.send(message)

    def _receive(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._inbox.put(self._connection.recv())
        self._inbox.put(None)
