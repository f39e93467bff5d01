"""The server's side of worker processes: starts them, asks them, kills those in which a call hangs.

All of it blocks and runs in the server's own threads, one a request, which only wait; they last as long as the server,
for a process dies with the thread that started it. A process that holds sessions of several clients may be killed for
the sake of one: `environments.py` opens the others' again elsewhere.
"""

import contextlib
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tools_server import registry
from tools_server.config import ChatConfig, ServerConfig
from tools_server.environment import InfrastructureFailure
from tools_server.errors import Conflict, log
from tools_server.workers.process import Failure

KINDS: dict[str, type[Exception]] = {
    "InfrastructureFailure": InfrastructureFailure,
    "Conflict": Conflict,
    "ValueError": ValueError,
}
"""Exceptions that mean something to the server; of others only the name is kept."""
START_TIMEOUT_S = 60.0
PROGRAM = "from tools_server.workers.process import main; main()"
keys = itertools.count()
"""Of environments, in all processes."""


class WorkerDied(Exception):
    """The process ended before it answered."""


class Worker:
    """One process."""

    def __init__(self, config: ServerConfig, on_end: Callable[[str], None]) -> None:
        """Does not wait until it is ready: the first request does. `on_end`: as that of `Workers`."""
        self._on_end, self._cause = on_end, "died"
        self._limit_s = _limit_s(config)
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(descriptor)],
                pass_fds=(descriptor,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._forgotten: deque[int] = deque()
        self.held: set[int] = set()
        """Keys of its environments."""
        self.alive, self.closing = True, False
        self._started = threading.Event()
        self._connection.send((config, dict(registry.ENVIRONMENTS), config.worker_threads))
        threading.Thread(target=self._read, daemon=True, name="environment-answers").start()

    def request(self, operation: str, *arguments: Any) -> Any:
        """What the process answers. Raises WorkerDied, what the operation raised there, or InfrastructureFailure where
        that takes too long: then the process is killed.
        """
        answer: Future[Any] = Future()
        if not self._started.wait(START_TIMEOUT_S):
            self.kill()
        with self._lock:
            if not self.alive:
                raise WorkerDied
            number = next(self._numbers)
            self._waiting[number] = answer
            forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
            with contextlib.suppress(OSError):  # it died: the reader will see
                self._connection.send((number, forgotten, operation, arguments))
        try:
            return answer.result(self._limit_s)
        except TimeoutError:
            log.warning("worker process %d is killed: a call took longer than %g s", self.process.pid, self._limit_s)
            self._cause = "hung"
            self.kill()
            raise InfrastructureFailure(f"the environment did not answer within {self._limit_s:g} s") from None

    def forget(self, key: int) -> None:
        """With the next request; may be called by the garbage collector, at any moment in any thread."""
        self.held.discard(key)
        self._forgotten.append(key)

    def kill(self) -> None:
        self.alive = False
        self.process.kill()

    def _read(self) -> None:
        """Until it dies, answer by answer."""
        try:
            self._connection.recv()  # READY
            self._started.set()
            while True:
                number, how, value = self._connection.recv()
                answer = self._waiting.pop(number)
                if how == "done":
                    answer.set_result(value)
                else:
                    answer.set_exception(_rebuilt(value))
        except (EOFError, OSError):
            pass
        finally:
            self.kill()
            status = self.process.wait()
            if not self.closing:
                log.warning("worker process %d has ended (status %d)", self.process.pid, status)
                self._on_end(self._cause)
            with self._lock:  # whoever comes later finds it dead
                waiting, self._waiting = self._waiting, {}
                self._connection.close()
            self._started.set()
            for answer in waiting.values():
                answer.set_exception(WorkerDied())


class Workers:
    """A server's processes, started when sessions need them, and the threads that wait for them."""

    def __init__(self, config: ServerConfig, on_end: Callable[[str], None] = lambda cause: None) -> None:
        """`on_end` is told, in any thread, of each process that ended before its time: it "died", or "hung"."""
        self._config, self._on_end = config, on_end
        self._workers: list[Worker] = []
        self._choosing = threading.Lock()
        self._closed = False
        self.threads = ThreadPoolExecutor(config.worker_threads, thread_name_prefix="environment")

    def choose(self, key: int) -> Worker:
        """For a new environment: the living process that holds the fewest, or one that is started. Raises
        InfrastructureFailure once closed: a call that was cut would be made again, and the server would wait for it.
        """
        with self._choosing:
            if self._closed:
                raise InfrastructureFailure("the server has stopped")
            self._workers = [worker for worker in self._workers if worker.alive]
            emptiest = min(self._workers, key=lambda worker: len(worker.held), default=None)
            if emptiest is None or (emptiest.held and len(self._workers) < self._config.worker_processes):
                emptiest = Worker(self._config, self._on_end)
                self._workers.append(emptiest)
            emptiest.held.add(key)
            return emptiest

    @property
    def processes(self) -> list[int]:
        """Ids of those that live."""
        return [worker.process.pid for worker in self._workers if worker.alive]

    def close(self) -> None:
        """Kill all; whoever waits for one stops waiting."""
        with self._choosing:
            self._closed = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.closing = True
            worker.kill()


def _limit_s(config: ServerConfig) -> float:
    """Of one request. Models that play a user or a judge have limits of their own, which come first."""
    models = [config.tools[name] for name in {config.tau2.user_model, config.tau2.judge} if name is not None]
    chats = [model for model in models if isinstance(model, ChatConfig)]
    return config.environment_timeout_s + sum(chat.timeout_s * (chat.retries + 1) for chat in chats)


def _rebuilt(failure: Failure) -> Exception:
    name = failure.kinds[0]
    kind: Callable[..., Any] = next((KINDS[name] for name in failure.kinds if name in KINDS), Exception)
    return kind(failure.text) if name in KINDS else type(name, (kind,), {})(failure.text)  # type: ignore[call-overload]
