"""Nothing of a guarded command is left: not its children, not its shared memory, however the end comes."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from jorch.serving import guard

COMMAND = """
import mmap, os, signal, subprocess, sys, time
from pathlib import Path
shared = Path(sys.argv[1])
shared.write_bytes(bytes(4096))
with shared.open("r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
Path(sys.argv[2]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(float(sys.argv[3]))
sys.exit(7)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def guarded(tmp_path):
    """Starts the guard around a command that has a child which ignores SIGTERM and maps shared memory."""
    shared = Path(f"/dev/shm/jorch-test-{uuid.uuid4().hex}")
    started = []

    def start(seconds):
        pids = tmp_path / "pids"
        command = [sys.executable, "-c", COMMAND, str(shared), str(pids), str(seconds)]
        process = subprocess.Popen([sys.executable, "-P", guard.__file__, *command], stdin=subprocess.PIPE)
        started.append(process)
        deadline_s = time.monotonic() + 60
        while not (pids.exists() and len(pids.read_text().split()) == 2):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return process, [int(pid) for pid in pids.read_text().split()], shared

    yield start
    for process in started:
        process.kill()
        process.communicate()
    shared.unlink(missing_ok=True)


@pytest.mark.parametrize("end", ["parent gone", "SIGTERM", "command killed", "command ends"])
def test_nothing_is_left(end, guarded):
    process, pids, shared = guarded(2.5 * guard.LOOK_S if end == "command ends" else 600)
    assert all(map(alive, pids))
    assert shared.exists()
    if end == "command killed":
        time.sleep(1.5 * guard.LOOK_S)
    if end == "parent gone":
        process.stdin.close()
    elif end == "SIGTERM":
        process.terminate()
    elif end == "command killed":
        os.kill(pids[0], signal.SIGKILL)
    status = process.wait(60)
    assert not any(map(alive, pids))
    assert not shared.exists()
    assert status == {"command killed": -signal.SIGKILL % 256, "command ends": 7}.get(end, 0)
