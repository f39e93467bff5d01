"""A run's own server lives exactly as long as the run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from jorch.rollout.server_process import start_tool_server

PARENT = """
import sys, time
from pathlib import Path
from jorch.rollout.server_process import start_tool_server
folder = Path(sys.argv[1])
with start_tool_server(folder / "server.yaml", folder / "log") as url:
    try:
        print(url, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        import urllib.request
        print(urllib.request.urlopen(url + "/healthz").status, flush=True)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("experts: {}\n")
    return path


@pytest.fixture
def parent(config):
    """A process of its own group that started a server, and that server's url."""
    command = [sys.executable, "-c", PARENT, str(config.parent)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    yield child, child.stdout.readline().strip()
    child.kill()
    child.communicate()


def is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=10) as response:
            return json.load(response)["status"] == "ok"
    except (urllib.error.URLError, ConnectionError):
        return False


def wait_until_down(url):
    deadline_s = time.monotonic() + 30
    while is_up(url):
        assert time.monotonic() < deadline_s, f"{url} outlived its parent"
        time.sleep(0.05)


def test_a_server_is_up_inside_and_down_after(config, tmp_path):
    with start_tool_server(config, tmp_path / "log") as url:
        assert is_up(url)
    assert not is_up(url)


def test_a_server_is_down_after_an_error(config, tmp_path):
    with pytest.raises(KeyError):
        with start_tool_server(config, tmp_path / "log") as url:
            raise KeyError
    assert not is_up(url)


def test_the_users_mistakes_come_back_as_the_servers_line(config, tmp_path):
    log = tmp_path / "log"
    log.write_text("an earlier run\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^tool server: port {port} is in use on 127.0.0.1; pass --port"):
            with start_tool_server(config, log, port):
                raise AssertionError
    config.write_text("exports: {}\n")
    with pytest.raises(ValueError, match=r"server\.yaml:1: unknown key 'exports'; did you mean 'experts'\?"):
        with start_tool_server(config, log):
            raise AssertionError
    assert log.read_text().startswith("an earlier run\nport ")


def test_a_server_that_dies_silently_is_not_blamed_on_an_earlier_run(config, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("an earlier run\n")
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(RuntimeError, match=r"^the tool server ended with status 0: no message \(log: .*log\)$"):
        with start_tool_server(config, log):
            raise AssertionError


def test_a_server_dies_with_a_parent_that_is_killed(parent):
    process, url = parent
    assert is_up(url)
    os.kill(process.pid, signal.SIGKILL)
    wait_until_down(url)


def test_ctrl_c_leaves_the_server_up_until_the_parent_ends(parent):
    process, url = parent
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert (out, process.returncode) == ("200\n", 0)
    assert not is_up(url)
