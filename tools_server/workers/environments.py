"""Environments that live in worker processes, as the session sees them.

What was asked of an environment is remembered here. Where its process has died, whosever fault that was, it is opened
in another one, and its calls are made again there; they must be answered as before. A call that was under way is then
made once more. It is a failure of the infrastructure where the second process dies too, or where an answer differs.
"""

import contextlib
import copy
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeVar

from tools_server.environment import Environment, InfrastructureFailure, Observation
from tools_server.workers.pool import Worker, WorkerDied, Workers, keys
from tools_server.workers.process import Opened

T = TypeVar("T")


@functools.lru_cache(maxsize=1024)
def _shared(pickled: bytes) -> Any:
    """Equal lists as one object: sessions of one domain have the same tools, siblings the same messages."""
    return pickle.loads(pickled)


class Origin(NamedTuple):
    """How an environment begins."""

    kind: str
    setup: dict[str, Any]
    seed: int


class Step(NamedTuple):
    """A call that an environment has answered."""

    name: str
    arguments: dict[str, Any]
    observation: Observation
    mark: Any
    """Where a branching environment stood after it."""


class WorkerEnvironment:
    """An environment in a worker process."""

    blocking = True

    def __init__(self, workers: Workers, origin: Origin) -> None:
        """Raises what the environment raises, and InfrastructureFailure."""
        self._workers = workers
        self._origin = origin
        self._steps: list[Step] = []
        opened = self._retried(self._open)
        self.tools, self.messages = _shared(opened.tools), _shared(opened.messages)
        self._start = opened.start

    def call(self, name: str, arguments: dict[str, Any]) -> Observation:
        observation, mark = self._ask("call", name, arguments)
        self._steps.append(Step(name, arguments, observation, mark))
        return observation

    def outcome(self) -> float:
        return self._ask("outcome")

    def _ask(self, operation: str, *arguments: Any) -> Any:
        return self._retried(lambda: self._living().request(operation, self._key, *arguments))

    def _living(self) -> Worker:
        """The process that holds the environment, which is opened again where it has died."""
        if not self._worker.alive:
            opened = self._open()
            again = [observation for observation, _ in opened.replayed]
            if again != [step.observation for step in self._steps] or _shared(opened.messages) != self.messages:
                raise InfrastructureFailure("its process ended, and its calls are answered otherwise in another one")
            self._start = opened.start
            self._steps = [
                step._replace(mark=mark) for step, (_, mark) in zip(self._steps, opened.replayed, strict=True)
            ]
        return self._worker

    def _open(self) -> Opened:
        """In a process with the calls that were made so far."""
        key = next(keys)
        worker = self._workers.choose(key)
        try:
            calls = [(step.name, step.arguments) for step in self._steps]
            opened = worker.request("open", key, *self._origin, calls)
        except BaseException:
            worker.forget(key)
            raise
        self._hold(worker, key)
        return opened

    def _hold(self, worker: Worker, key: int) -> None:
        """The process may forget the environment when this object goes."""
        self._worker, self._key = worker, key
        weakref.finalize(self, worker.forget, key).atexit = False

    def _retried(self, action: Callable[[], T]) -> T:
        for _ in range(2):
            with contextlib.suppress(WorkerDied):
                return action()
        raise InfrastructureFailure("two processes ended one after the other at this call")


class BranchingWorkerEnvironment(WorkerEnvironment):
    """One that branches there. A mark is the number of its calls."""

    def mark(self) -> int:
        return len(self._steps)

    def branch(self, mark: int) -> Self:
        """In the same process, where it costs little."""
        branched, key = copy.copy(self), next(keys)
        branched._steps = self._steps[:mark]

        def branch_once() -> Worker:
            worker = self._living()
            worker.request("branch", self._key, key, self._steps[mark - 1].mark if mark else self._start)
            return worker

        worker = self._retried(branch_once)
        worker.held.add(key)
        branched._hold(worker, key)
        return branched

    def state(self) -> str:
        return self._ask("state")


def open_environment(workers: Workers, origin: Origin, kind: type[Environment]) -> Environment:
    """A new environment of the class `kind` in one of the processes."""
    environment: Any = BranchingWorkerEnvironment if hasattr(kind, "branch") else WorkerEnvironment
    return environment(workers, origin)
