"""Several processes on this machine, each with its own CPU devices: a cluster's code path without a cluster.

The launcher only watches. The first process that fails stops the others, and its last word becomes the launcher's.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SCRIPT = "import sys; from jorch.cli import main; sys.exit(main())"
_GRACE_S = 10.0


class Process:
    """A running rank. Its stderr is passed on, line by line, with the rank before it."""

    def __init__(self, rank: int, command: Sequence[str]) -> None:
        self.rank = rank
        self.last_line = ""
        self._muted = False
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self._child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            if line.strip():
                self.last_line = line.strip()
            # A user's mistake is one line, which the launcher prints with the rank.
            if not self._muted and not line.startswith("jorch: "):
                print(f"[{self.rank}] {line}", end="", file=sys.stderr, flush=True)

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    def reason(self) -> str:
        """Why it ended, in a few words."""
        self._reader.join(timeout=5)
        status = self._child.returncode
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}: {self.last_line.removeprefix('jorch: ').removeprefix('error: ')}"

    def stop(self, deadline_s: float) -> None:
        """Ask it to end; at `deadline_s` of the monotonic clock, end it. What it says meanwhile is of no interest."""
        self._muted = True
        if self.status() is None:
            self._child.terminate()
            try:
                self._child.wait(max(deadline_s - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


def run(arguments: Sequence[str], num_processes: int) -> None:
    """Run `jorch ARGUMENTS` as `num_processes` processes and wait for all.

    Raises ValueError where the first failure is a mistake that the user can mend (exit status 2), otherwise
    ChildProcessError; both name the rank and the reason.
    """
    address = f"127.0.0.1:{_free_port()}"
    processes: list[Process] = []
    with _stopping(processes):
        with _signals_held_back():  # a process that is started but not yet listed would outlive us
            for rank in range(num_processes):
                place = f"{rank}/{num_processes}@{address}"
                processes.append(Process(rank, [sys.executable, "-c", _SCRIPT, *arguments, "--process", place]))
        failed = _first_failure(processes)
    if failed is not None:
        line = f"process {failed.rank} of {num_processes} {failed.reason()}; the others were stopped"
        raise ValueError(line) if failed.status() == 2 else ChildProcessError(line)


def _first_failure(processes: Sequence[Process]) -> Process | None:
    """Wait until one has failed, or all have ended well."""
    while True:
        ended = [process for process in processes if process.status() is not None]
        # The victim of a signal comes first: the others fail because of it.
        failed = sorted((p for p in ended if p.status()), key=lambda p: ((p.status() or 0) > 0, p.rank))
        if failed:
            return failed[0]
        if len(ended) == len(processes):
            return None
        time.sleep(0.05)


@contextmanager
def _stopping(processes: Sequence[Process]) -> Iterator[None]:
    """No process outlives the block, also when the launcher is told to end."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        deadline_s = time.monotonic() + _GRACE_S
        with _signals_held_back():
            for process in processes:
                process.stop(deadline_s)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """SIGTERM and Ctrl-C take effect at the end of the block."""
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
