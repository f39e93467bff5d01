"""A tool server of this run's own, as a child process on loopback that never outlives it."""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jorch.sections import ServerSection

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
READY = "tools-server ready "


@contextlib.contextmanager
def tool_server(section: ServerSection, log: Path) -> Iterator[str]:
    """The url of the server that a stage's config names: a running one, or one of the stage's own."""
    if section.url is not None:
        yield section.url
        return
    assert section.config is not None
    with start_tool_server(Path(section.config), log) as url:
        yield url


@contextlib.contextmanager
def start_tool_server(config: Path, log: Path, port: int = 0) -> Iterator[str]:
    """Start a server, give its url, stop it at exit; its stderr is appended to `log`.

    The child holds the read end of a pipe whose write end only this process has, and stops when that
    closes: with this process, however it dies. Ctrl-C does not reach the child, so the run can end in order
    first.

    Raises ValueError with the server's own line where its config or port is at fault.
    """
    command = [sys.executable, "-m", "tools_server", "--config", str(config), "--exit-with-parent"]
    with log.open("ab") as log_file:
        log_start = log_file.tell()
        child = subprocess.Popen(
            [*command, "--port", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,
        )
    try:
        line = _first_line(child)
        if not line.startswith(READY):
            raise _failure(child, log, log_start)
        yield line.removeprefix(READY)
    finally:
        _stop(child)


def _first_line(child: subprocess.Popen[bytes]) -> str:
    """The child's first line on stdout; what there is of it where the child ends or is too slow."""
    assert child.stdout is not None
    deadline_s = time.monotonic() + START_TIMEOUT_S
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([child.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
        chunk = os.read(child.stdout.fileno(), 4096) if readable else b""
        if not chunk:
            break
        line += chunk
    return line.decode(errors="replace").strip()


def _failure(child: subprocess.Popen[bytes], log: Path, log_start: int) -> Exception:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(STOP_TIMEOUT_S)
    with log.open("rb") as log_file:
        log_file.seek(log_start)
        lines = log_file.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no message"
    if child.returncode == 2:
        return ValueError(f"tool server: {last}")
    state = "did not start" if child.returncode is None else f"ended with status {child.returncode}"
    return RuntimeError(f"the tool server {state}: {last} (log: {log})")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets it drain; SIGKILL follows."""
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
