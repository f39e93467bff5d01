"""A worker process: holds environments of many sessions and does with them what the server asks, until that is gone.

Started by `pool.py` with the descriptor of a socket as argument. First come the server's config, the environments'
kinds and the number of threads, answered by READY; then requests (number, keys to forget, operation, arguments), each
answered by (number, "done", value) or (number, "failed", Failure). One environment does one thing at a time; several do
theirs side by side.
"""

import ctypes
import gc
import logging
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tools_server import registry
from tools_server.config import ServerConfig
from tools_server.environment import Branching, Environment, InfrastructureFailure, Observation
from tools_server.logs import start_logging

READY = "ready"
PR_SET_PDEATHSIG = 1
log = logging.getLogger("tools_server")


class Opened(NamedTuple):
    """What a session has to know of an environment. Lists are pickled, so that equal ones are easily found equal."""

    tools: bytes
    messages: bytes
    start: Any
    """Its first mark; None where it does not branch."""
    replayed: list[tuple[Observation, Any]]
    """Answer and mark of each call that was made again."""


class Failure(NamedTuple):
    """An exception, to be raised again in the server."""

    kinds: list[str]
    """Names of its class and of that class's ancestors."""
    text: str


class _Held:
    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.one_at_a_time = threading.Lock()

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[Observation, Any]:
        return self.environment.call(name, arguments), self.mark()

    def mark(self) -> Any:
        return self.environment.mark() if isinstance(self.environment, Branching) else None


class Process:
    """The operations, by name."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._held: dict[int, _Held] = {}

    def forget(self, keys: list[int]) -> None:
        for key in keys:
            self._held.pop(key, None)

    def open(
        self, key: int, kind: str, setup: dict[str, Any], seed: int, calls: list[tuple[str, dict[str, Any]]]
    ) -> Opened:
        """A new environment, in which `calls` are made."""
        held = _Held(registry.environment_class(kind)(setup, seed, self._config))
        start = held.mark()
        replayed = [held.call(name, arguments) for name, arguments in calls]
        self._held[key] = held
        tools, messages = pickle.dumps(held.environment.tools), pickle.dumps(held.environment.messages)
        return Opened(tools, messages, start, replayed)

    def branch(self, key: int, new_key: int, mark: Any) -> None:
        source = self._held[key]
        assert isinstance(source.environment, Branching)
        with source.one_at_a_time:
            self._held[new_key] = _Held(source.environment.branch(mark))

    def call(self, key: int, name: str, arguments: dict[str, Any]) -> tuple[Observation, Any]:
        with self._held[key].one_at_a_time:
            return self._held[key].call(name, arguments)

    def state(self, key: int) -> str:
        environment = self._held[key].environment
        assert isinstance(environment, Branching)
        with self._held[key].one_at_a_time:
            return environment.state()

    def outcome(self, key: int) -> float:
        with self._held[key].one_at_a_time:
            return float(self._held[key].environment.outcome())


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    _end_with_the_server()
    start_logging()
    config, kinds, num_threads = connection.recv()
    registry.ENVIRONMENTS.update(kinds)
    gc.set_threshold(10_000, 10, 10)  # calls make copies by the thousand, few of them in cycles
    process, sending = Process(config), threading.Lock()
    threads = ThreadPoolExecutor(num_threads)
    connection.send(READY)

    def answer(number: int, operation: str, arguments: tuple[Any, ...]) -> None:
        try:
            reply = pickle.dumps((number, "done", getattr(process, operation)(*arguments)))
        except Exception as error:
            if not isinstance(error, (ValueError, InfrastructureFailure)):
                log.exception("an environment failed")
            reply = pickle.dumps((number, "failed", Failure([kind.__name__ for kind in type(error).mro()], str(error))))
        with sending:
            connection.send_bytes(reply)

    while True:
        try:
            number, forgotten, operation, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # whatever the threads do
        process.forget(forgotten)
        threads.submit(answer, number, operation, arguments)


def _end_with_the_server() -> None:
    """However it dies, and whatever this process does then. Signals of a terminal are for the server."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
