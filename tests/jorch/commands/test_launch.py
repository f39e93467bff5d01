"""`jorch launch --local 2`: a cluster's code path on one machine. The oracle is one process with the same mesh."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jorch.run_folder import read_jsonl

SHARDED = ("mesh.fsdp=2", "optimizer.clip_norm=0.5")


def timeless(run_folder: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(run_folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("time", "speed"))} for row in rows]


def rank_pid(world: Path, rank: int) -> int | None:
    """The process of this world that was told to be `rank`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if (process / "cwd").readlink() == world and any(w.startswith(b"%d/2@" % rank) for w in words):
                return int(process.name)
    return None


def one_process(jorch: Any, *overrides: str) -> None:
    """`sft` into folder `one`, both devices in one process."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    single = type(jorch)(jorch.world, jorch.environment | flags, jorch.children)
    result = single.run("sft", "sft.yaml", "out=one", *SHARDED, *overrides)
    assert (result.returncode, result.stderr) == (0, "")


def assert_same(world: Path) -> None:
    assert timeless(world / "sft") == timeless(world / "one")
    weights = [world / folder / "model" / "model.safetensors" for folder in ("sft", "one")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_two_processes_end_bit_by_bit_like_one(jorch: Any) -> None:
    few = ("steps=2", "checkpoint.every_steps=2")
    one_process(jorch, *few)
    result = jorch.run("launch", "sft.yaml", *SHARDED, *few, "--local", "2")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("model: sft/model") == 1  # one writer
    assert len(timeless(jorch.world / "sft")) == 2
    assert_same(jorch.world)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rollouts_of_two_processes_train_like_those_of_one(jorch: Any) -> None:
    """Each plays half of the tasks through a server of its own; all trajectories end in one batch.

    The sampler's batches are halved, which moves log-probabilities by rounding, and with them the importance weights.
    Adam divides a gradient by its own size: where it is little but rounding, an element moves by up to the learning
    rate a step, either way.
    """
    few = ("steps=2", "mesh.fsdp=2", "checkpoint.every_steps=2", "log_trajectories=4")
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    single = type(jorch)(jorch.world, jorch.environment | flags, jorch.children)
    one = single.run("rl", "rl.yaml", "out=one", *few)
    assert (one.returncode, one.stderr) == (0, "")
    two = jorch.run("launch", "rl.yaml", *few, "--local", "2")
    assert (two.returncode, two.stderr) == (0, "")
    assert two.stdout.count("model: rl/model") == 1  # one writer
    assert sorted(p.name for p in (jorch.world / "rl" / "processes").iterdir()) == ["0", "1"]
    rows = [read_jsonl(jorch.world / folder / "trajectories.jsonl") for folder in ("rl", "one")]
    played = [
        [(r["step"], r["task_id"], r["reward"], [turn["token_ids"] for turn in r["turns"]]) for r in found]
        for found in rows
    ]
    assert len(played[0]) == 2 * 4 * 4
    assert played[0] == played[1]
    for ours, theirs in zip(timeless(jorch.world / "rl"), timeless(jorch.world / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    weights = [load_file(jorch.world / folder / "model" / "model.safetensors") for folder in ("rl", "one")]
    differences = np.concatenate([np.abs(x - weights[1][name]).ravel() for name, x in weights[0].items()])
    assert differences.max() <= 2 * 2 * 1e-3
    assert np.mean(differences > 1e-5) < 1e-3
    assert jorch.stray() == []


@pytest.mark.slow
def test_a_mistake_is_one_line_with_the_rank(jorch: Any) -> None:
    line = jorch.line(2, "launch", "sft.yaml", "mesh.fsdp=3", "--local", "2")
    assert line.startswith("error: process ")
    assert " of 2 ended with status 2: mesh data=-1 fsdp=3 " in line
    assert line.endswith("; the others were stopped")
    assert jorch.stray() == []


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_the_run_goes_on(jorch: Any) -> None:
    one_process(jorch, "steps=60")
    launcher = jorch.start("launch", "sft.yaml", *SHARDED, "steps=60", "--local", "2")
    jorch.wait(lambda: read_jsonl(jorch.world / "sft" / "metrics.jsonl")[3:], "step 3")
    os.kill(rank_pid(jorch.world, 1) or 0, signal.SIGKILL)
    killed_s = time.monotonic()
    _, stderr = launcher.communicate(timeout=60)
    assert time.monotonic() - killed_s < 60
    assert launcher.returncode == 1
    assert "process 1 of 2 was killed by SIGKILL; the others were stopped; go on with: jorch launch " in stderr
    assert jorch.stray() == []
    assert len(timeless(jorch.world / "sft")) < 60
    resumed = jorch.run("launch", "sft.yaml", *SHARDED, "steps=60", "--local", "2", "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same(jorch.world)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_killed_while_it_samples_stops_the_others_and_the_run_goes_on(jorch: Any) -> None:
    """The oracle is a run of two processes that nobody disturbed."""
    options = ("steps=5", "mesh.fsdp=2", "log_trajectories=4", "--local", "2")
    undisturbed = jorch.run("launch", "rl.yaml", "out=one", *options)
    assert (undisturbed.returncode, undisturbed.stderr) == (0, "")
    launcher = jorch.start("launch", "rl.yaml", *options)
    jorch.wait(lambda: read_jsonl(jorch.world / "rl" / "metrics.jsonl")[1:], "step 1")
    os.kill(rank_pid(jorch.world, 1) or 0, signal.SIGKILL)
    killed_s = time.monotonic()
    _, stderr = launcher.communicate(timeout=60)
    assert time.monotonic() - killed_s < 60
    assert launcher.returncode == 1
    [line] = [line for line in stderr.splitlines() if line.startswith("jorch: ")]
    assert "process 1 of 2 was killed by SIGKILL; the others were stopped; go on with: jorch launch " in line
    assert jorch.stray() == []
    assert len(timeless(jorch.world / "rl")) < 5
    resumed = jorch.run("launch", "rl.yaml", *options, "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert timeless(jorch.world / "rl") == timeless(jorch.world / "one")
    for name in ("model/model.safetensors", "trajectories.jsonl"):
        assert (jorch.world / "rl" / name).read_bytes() == (jorch.world / "one" / name).read_bytes()
    assert jorch.stray() == []


@pytest.mark.slow
def test_a_process_told_to_end_takes_the_others_to_the_same_step(jorch: Any) -> None:
    """SIGTERM to one of them, as where one machine is taken away."""
    few = ("steps=400", "checkpoint.every_steps=1000")
    launcher = jorch.start("launch", "sft.yaml", *SHARDED, *few, "--local", "2")
    jorch.wait(lambda: read_jsonl(jorch.world / "sft" / "metrics.jsonl")[3:], "step 3")
    os.kill(rank_pid(jorch.world, 1) or 0, signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=120)
    saved = len(timeless(jorch.world / "sft"))
    assert launcher.returncode == 1
    assert f"ended with status 143: stopped by SIGTERM after step {saved - 1}, which is saved" in stderr
    assert saved < 400
    assert (jorch.world / "sft" / "checkpoints" / str(saved) / "state").is_dir()
    assert jorch.stray() == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_without_a_launcher_too_the_others_stop_within_a_minute(victim: int, jorch: Any) -> None:
    """As on a cluster, where nobody but the processes themselves notices."""
    place = f"2@127.0.0.1:{47000 + os.getpid() % 1000 + victim}"
    ranks = [jorch.start("sft", "sft.yaml", *SHARDED, "steps=1000", "--process", f"{rank}/{place}") for rank in (0, 1)]
    jorch.wait(lambda: read_jsonl(jorch.world / "sft" / "metrics.jsonl"), "step 0")
    ranks[victim].kill()
    ranks[1 - victim].communicate(timeout=60)
    assert ranks[1 - victim].returncode not in (0, None)


def test_an_interrupt_leaves_nothing_behind(jorch: Any) -> None:
    launcher = jorch.start("launch", "sft.yaml", *SHARDED, "--local", "2")
    jorch.wait(lambda: rank_pid(jorch.world, 1), "process 1")
    launcher.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == 130
    assert "interrupted; go on with: jorch launch sft.yaml" in stderr
    assert jorch.stray() == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "error: one of the arguments --local --slurm --k8s is required (see `jorch launch --help`)"),
        (("--k8s", "--dry-run"), "error: --k8s needs --image (see `jorch launch --help`)"),
        (("--slurm",), "error: sbatch is not installed here: run this on a login node, or add --dry-run"),
        (("--local", "0"), "error: argument --local: 0 is not a positive number (see `jorch launch --help`)"),
    ],
)
def test_what_launch_refuses(arguments: tuple[str, ...], line: str, main: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert main(2, "launch", "sft.yaml", *arguments) == line
