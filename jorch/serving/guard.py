"""A supervisor: runs a command in a session of its own and leaves nothing of it behind. Standard library only.

    python -P guard.py COMMAND ARG...

It ends the command when its own stdin closes, that is with its parent, however that dies; on SIGTERM; and cleans up
when the command dies by itself. vLLM needs it: its engine and worker processes outlive a killed front end, and so
does their shared memory.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""
LOOK_S = 1.0
"""Between looks at what the command's processes map."""
_SHARED_MEMORY = "/dev/shm/"


def main(command: list[str]) -> int:
    """The command's exit status; 0 where it was ended on request."""
    ended: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ended.append(number))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    shared: set[str] = set()
    next_look_s = 0.0
    while child.poll() is None and not ended:
        if time.monotonic() >= next_look_s:  # a process that is killed takes the knowledge of its mappings along
            shared |= _shared_memory_of(child.pid)
            next_look_s = time.monotonic() + LOOK_S
        with contextlib.suppress(InterruptedError):
            readable, _, _ = select.select([sys.stdin], [], [], 0.2)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                break
    status = child.poll()
    _end(child, shared)
    return 0 if status is None else status


def _end(child: subprocess.Popen[bytes], shared: set[str]) -> None:
    """SIGTERM to the command, SIGKILL to what is left of its session, and its shared memory goes."""
    shared = shared | _shared_memory_of(child.pid)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    deadline_s = time.monotonic() + GRACE_S
    while members := list(_session(child.pid)):
        late = time.monotonic() > deadline_s
        for pid in members:
            # Python's resource trackers end after the others and remove semaphores that those have left.
            if late or not _is_resource_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        child.poll()
        time.sleep(0.05)
    for path in shared - _shared_memory_in_use():
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(path)


def _session(leader: int) -> Iterator[int]:
    """The living processes of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                yield int(stat.parent.name)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _shared_memory_of(leader: int) -> set[str]:
    return {path for pid in _session(leader) for path in _mapped(pid)}


def _shared_memory_in_use() -> set[str]:
    return {path for folder in Path("/proc").glob("[0-9]*") for path in _mapped(int(folder.name))}


def _mapped(pid: int) -> set[str]:
    """Files under /dev/shm that a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {_SHARED_MEMORY + line.split(_SHARED_MEMORY, 1)[1].split()[0] for line in lines if _SHARED_MEMORY in line}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
