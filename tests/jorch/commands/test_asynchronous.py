"""`jorch rl` with rollouts in a process of their own, cut short in every way that it may be."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jorch.run_folder import read_jsonl

pytestmark = pytest.mark.slow

ASYNCHRONOUS = ("rl", "rl.yaml", "max_policy_lag=1", "steps=6")


def rows(world: Path) -> list[dict[str, Any]]:
    return read_jsonl(world / "rl" / "metrics.jsonl")


def process_of(world: Path, module: str) -> int:
    """The number of the process that runs `module` in `world`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == world and module.encode() in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process runs {module}")


def test_a_run_that_is_killed_goes_on_and_leaves_nothing_behind(jorch: Any) -> None:
    child = jorch.start(*ASYNCHRONOUS)
    jorch.wait(lambda: len(rows(jorch.world)) >= 2, "two steps")
    child.kill()
    child.communicate()
    jorch.wait(lambda: jorch.stray() == [], "the end of rollouts and tool server", timeout_s=60)
    done = len(rows(jorch.world))
    assert 2 <= done < 6, "the cut did not come in time"

    result = jorch.run(*ASYNCHRONOUS, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.stray() == []
    found = rows(jorch.world)
    assert [row["step"] for row in found] == list(range(6))
    assert all(row["policy/lag_max"] <= 1 for row in found)
    assert sum(row["policy/lag"] for row in found) > 0, "rollouts went on beside the updates"
    assert all(row["rollout/infra_error"] == 0 for row in found)
    trajectories = read_jsonl(jorch.world / "rl" / "trajectories.jsonl")
    for record in trajectories:
        for turn in record["turns"]:
            assert len(turn["policy_versions"]) == turn["num_tokens"]
            assert all(record["step"] - 1 <= version <= record["step"] for version in turn["policy_versions"])
    ids = {(record["step"], record["trajectory_id"]) for record in trajectories}
    assert len(ids) == len(trajectories)


def test_rollouts_that_die_stop_the_run_resumably(jorch: Any) -> None:
    child = jorch.start(*ASYNCHRONOUS)
    jorch.wait(lambda: rows(jorch.world), "a step")
    os.kill(process_of(jorch.world, "jorch.rl.rollout_worker"), signal.SIGKILL)
    _, stderr = child.communicate(timeout=200)
    assert child.returncode == 1, stderr
    command = "jorch rl rl.yaml max_policy_lag=1 steps=6 --resume"
    assert stderr == f"jorch: error: the rollout process ended with status -9; go on with: {command}\n"
    assert jorch.stray() == []


def test_a_tool_server_that_dies_stops_the_run_by_its_address(jorch: Any) -> None:
    child = jorch.start(*ASYNCHRONOUS)
    jorch.wait(lambda: rows(jorch.world), "a step")
    os.kill(process_of(jorch.world, "tools_server"), signal.SIGKILL)
    _, stderr = child.communicate(timeout=200)
    assert child.returncode == 1, stderr
    assert stderr.startswith("jorch: error: tool server http://127.0.0.1:")
    assert stderr.endswith(" --resume\n")
    assert jorch.stray() == []
