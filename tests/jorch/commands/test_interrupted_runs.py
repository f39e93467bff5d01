"""Runs that are cut short: by Ctrl-C, by kill -9, by a tool server that dies. Going on gives what would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def steps_done(world: Path) -> int:
    """Steps in the metrics so far."""
    path = world / "rl" / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def begin_checkpoint(world: Path) -> bool:
    return any((world / "rl" / "checkpoints").glob("*tmp*"))


MOMENTS: dict[str, Callable[[Any], bool]] = {
    "starting": lambda world: (world / "rl" / "config.yaml").exists(),
    "compiling": lambda world: (world / "rl" / "checkpoints" / "0").exists(),
    "saving": begin_checkpoint,
    "stepping": lambda world: steps_done(world) >= 2,
    "exporting": lambda world: steps_done(world) == 4,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_leaves_a_run_that_goes_on(moment: str, jorch: Any, reference: Path) -> None:
    child = jorch.start("rl", "rl.yaml")
    jorch.wait(lambda: MOMENTS[moment](jorch.world), moment)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, stderr = child.communicate(timeout=200)
    assert (child.returncode, stderr) == (130, "jorch: interrupted; go on with: jorch rl rl.yaml --resume\n")
    assert jorch.stray() == []
    result = jorch.run("rl", "rl.yaml", "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)


def test_a_second_ctrl_c_changes_nothing(jorch: Any) -> None:
    child = jorch.start("rl", "rl.yaml")
    jorch.wait(lambda: steps_done(jorch.world) >= 1, "a step")
    for _ in range(3):
        os.killpg(child.pid, signal.SIGINT)
    _, stderr = child.communicate(timeout=200)
    assert (child.returncode, stderr) == (130, "jorch: interrupted; go on with: jorch rl rl.yaml --resume\n")
    assert jorch.stray() == []


@pytest.mark.parametrize("moment", ["saving", "stepping"])
def test_kill_9_leaves_a_run_that_goes_on(moment: str, jorch: Any, reference: Path) -> None:
    child = jorch.start("rl", "rl.yaml")
    jorch.wait(lambda: MOMENTS[moment](jorch.world), moment)
    child.kill()
    child.communicate()
    jorch.wait(lambda: jorch.stray() == [], "the tool server's end", timeout_s=30)
    result = jorch.run("rl", "rl.yaml", "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_sigterm_saves_the_step_and_ends(command: str, jorch: Any) -> None:
    """As a scheduler sends it: a checkpoint outside of the interval, and the same end as a run left in peace."""
    rare = (f"{command}.yaml", "checkpoint.every_steps=100", "steps=6")
    child = jorch.start(command, *rare)
    metrics = jorch.world / command / "metrics.jsonl"
    jorch.wait(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, "two steps")
    child.terminate()
    _, stderr = child.communicate(timeout=200)
    step = metrics.read_text().count("\n")
    assert (child.returncode, stderr) == (
        143,
        f"jorch: stopped by SIGTERM after step {step - 1}, which is saved; "
        f"go on with: jorch {command} {' '.join(rare)} --resume\n",
    )
    assert jorch.stray() == []
    assert 2 <= step < 6
    assert (jorch.world / command / "checkpoints" / str(step) / "state").is_dir()
    assert jorch.run(command, *rare, "--resume").returncode == 0
    undisturbed = jorch.run(command, *rare, "out=whole")
    assert undisturbed.returncode == 0
    files = [jorch.world / folder / "model" / "model.safetensors" for folder in (command, "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@contextmanager
def server(world: Path, port: int = 0) -> Any:
    """A tool server of the user's own, which outlives runs; gives the process and its address."""
    command = [sys.executable, "-m", "tools_server", "--config", "server.yaml", "--port", str(port)]
    child = subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        yield child, child.stdout.readline().removeprefix("tools-server ready ").strip()
    finally:
        child.kill()
        child.communicate()


def test_a_tool_server_killed_in_the_middle(jorch: Any, reference: Path) -> None:
    with server(jorch.world) as (process, url):
        arguments = ("rl", "rl.yaml", "tools_server.config=null", f"tools_server.url={url}")
        child = jorch.start(*arguments)
        jorch.wait(lambda: steps_done(jorch.world) >= 1, "a step")
        process.kill()
        _, stderr = child.communicate(timeout=200)
    assert child.returncode == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"jorch: error: tool server {url} does not answer (2 attempts at /v1/")
    assert stderr.endswith(f"; go on with: jorch {' '.join(arguments)} --resume\n")
    rows = [json.loads(line) for line in (jorch.world / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout/infra_error"] == 0 for row in rows)
    with server(jorch.world, int(url.rpartition(":")[2])):
        result = jorch.run(*arguments, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)


def test_a_tool_server_restarted_in_the_middle(jorch: Any, reference: Path) -> None:
    """The sessions it forgot are played again, and nothing is scored that it did not judge."""
    with server(jorch.world) as (process, url):
        child = jorch.start(
            "rl", "rl.yaml", "tools_server.config=null", f"tools_server.url={url}", "rollout.call_retries=8"
        )
        jorch.wait(lambda: steps_done(jorch.world) >= 1, "a step")
        process.kill()
        process.wait()
        with server(jorch.world, int(url.rpartition(":")[2])):
            _, stderr = child.communicate(timeout=200)
    assert (child.returncode, stderr) == (0, "")
    assert jorch.same_as(reference)


def test_a_runs_own_tool_server_killed_in_the_middle(jorch: Any, reference: Path) -> None:
    child = jorch.start("rl", "rl.yaml")
    jorch.wait(lambda: steps_done(jorch.world) >= 1, "a step")
    pids = subprocess.run(["pgrep", "-P", str(child.pid), "-f", "tools_server"], capture_output=True, text=True).stdout
    os.kill(int(pids), signal.SIGKILL)
    _, stderr = child.communicate(timeout=200)
    assert child.returncode == 1
    assert stderr.startswith("jorch: error: tool server http://127.0.0.1:")
    assert stderr.endswith("; go on with: jorch rl rl.yaml --resume\n")
    assert stderr.count("\n") == 1
    assert jorch.run("rl", "rl.yaml", "--resume").returncode == 0
    assert jorch.same_as(reference)


def test_two_processes_in_one_folder(jorch: Any) -> None:
    child = jorch.start("rl", "rl.yaml", "steps=1000")
    jorch.wait(lambda: (jorch.world / "rl" / "config.yaml").exists(), "the folder")
    for option in ("--resume", "--fresh"):
        line = jorch.line(2, "rl", "rl.yaml", option)
        assert line.startswith(f"error: rl is in use by process {child.pid} on ")
        assert line.endswith(": wait for it, or choose another out=")
        assert child.poll() is None


def test_a_finished_run_asks_before_it_starts_again(jorch: Any, reference: Path) -> None:
    shutil.copytree(reference, jorch.world, dirs_exist_ok=True)
    line = jorch.line(2, "rl", "rl.yaml")
    assert line == (
        "error: rl already holds a run, at step 3: pass --resume to go on, --fresh to start again, or another out="
    )
    resumed = jorch.run("rl", "rl.yaml", "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert jorch.same_as(reference)
    (jorch.world / "rl" / "notes.txt").write_text("mine")
    fresh = jorch.run("rl", "rl.yaml", "--fresh", "steps=1")
    assert (fresh.returncode, fresh.stderr) == (0, "")
    assert steps_done(jorch.world) == 1
    assert (jorch.world / "rl" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (jorch.world / "rl" / "checkpoints").iterdir()) == ["0", "1"]
