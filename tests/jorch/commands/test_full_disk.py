"""A disk that is really full, and folders that are not ours to write: the line names the path, nothing is lost."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jorch.checkpoint import Checkpoints
from jorch.data import tokenizer as tokenizers
from jorch.evals.report import write_report
from jorch.export import hf
from jorch.export.pretrained import BASE
from jorch.metrics import MetricWriter
from jorch.rl.report import TrajectoryLog
from jorch.run_folder import atomic_write
from jorch.sections import CheckpointConfig, MiniatureConfig
from jorch.synth import miniature
from jorch.types import Completion, Group, Trajectory, Turn

Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes a file system in memory of a given size, in a mount namespace that ends with the test."""
    holders: list[subprocess.Popen[str]] = []

    def make(size: str) -> Path:
        point = tmp_path / "disk"
        point.mkdir()
        script = f"mount -t tmpfs -o size={size} tmpfs '{point}' && echo ready && cat"
        holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            _, reason = holder.communicate()
            pytest.skip(f"no tmpfs can be mounted here: {reason.strip()}")
        return Path(f"/proc/{holder.pid}/root{point}")

    yield make
    for holder in holders:
        holder.communicate()


def fill(folder: Path) -> Path:
    """A file that takes all the space that is left."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return ballast


def group() -> Group:
    """One trajectory, long enough to need space."""
    (task,) = miniature.tasks(MiniatureConfig(num_train=1), "train", 0)
    completion = Completion(
        np.arange(5000, dtype=np.int32) % 256, np.zeros(5000, np.float32), "stop", np.zeros(5000, np.int32)
    )
    turn = Turn(np.zeros(8, np.int32), completion, (), ())
    trajectory = Trajectory(task.task_id, "t", (turn,), "answered", 1.0, 0, 0.01, 2.0, {})
    return Group(task, (trajectory,), np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_every_writer_names_what_it_could_not_write(disk: Disk) -> None:
    folder = disk("4m")
    tokenizer = tokenizers.load_folder(BASE)
    config = hf.load_config(BASE)
    params = {"embed": np.zeros((1000, 64), np.float32), "layers": {}}
    (folder / "summary.json").write_text("{}")
    metrics = MetricWriter(folder)
    log = TrajectoryLog(folder, 0, tokenizer, 1)
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig())
    checkpoints.save(1, {"x": np.ones(1000)}, {})
    checkpoints.__exit__(None, None, None)
    fill(folder)

    def write_metrics() -> None:
        for step in range(100):
            metrics.write(step, {"reward/mean": 0.5})

    def save_checkpoints() -> None:
        with Checkpoints(folder / "checkpoints", CheckpointConfig()) as full:
            for step in (2, 3):
                full.save(step, {"x": np.ones(100_000)}, {})

    cases: dict[str, Callable[[], object]] = {
        "summary.json": lambda: atomic_write(folder / "summary.json", "x" * 10_000),
        "report.html": lambda: write_report(folder),
        "metrics.jsonl": write_metrics,
        "trajectories.jsonl": lambda: log.write(0, [group()]),
        "model": lambda: hf.save(folder / "model", config, params, tokenizer),
        "architecture": lambda: hf.save_architecture(folder, config, tokenizer),
        "checkpoints": save_checkpoints,
    }
    for name, write in cases.items():
        with pytest.raises(OSError) as caught:
            write()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder / name))
    assert (folder / "summary.json").read_text() == "{}"
    assert not list(folder.glob(".*partial"))
    with Checkpoints(folder / "checkpoints", CheckpointConfig(), read_only=True) as kept:
        assert kept.latest_step() == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("left_kib", [8, 64, 6000, 9000])
def test_a_run_goes_on_when_there_is_space_again(left_kib: int, disk: Disk, jorch: Any, reference: Path) -> None:
    """A checkpoint takes about 2700 KiB."""
    folder = disk("40m")
    ballast = fill(folder)
    os.truncate(ballast, ballast.stat().st_size - 1024 * left_kib)
    arguments = ("rl", "rl.yaml", f"out={folder / 'rl'}")
    line = jorch.line(1, *arguments)
    assert line.startswith(f"error: {folder / 'rl'}")
    assert line.endswith(f": No space left on device; go on with: jorch {' '.join(arguments)} --resume")
    assert jorch.stray() == []
    ballast.unlink()
    result = jorch.run(*arguments, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference, folder / "rl")


@pytest.fixture
def unprivileged() -> tuple[str, ...]:
    """Takes from root what lets it write anywhere and read anything."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root here, and no setpriv to give up its privileges")
    return ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_permission(jorch: Any, unprivileged: tuple[str, ...]) -> None:
    (jorch.world / "mine").mkdir(mode=0o555)
    for arguments in (("rl", "rl.yaml", "out=mine/run"), ("quickstart", "--out", "mine/run")):
        line = jorch.line(2, *arguments, through=unprivileged)
        assert line == "error: mine/run: Permission denied"
    assert jorch.line(2, "eval", "eval.yaml", "out=mine", through=unprivileged) == (
        "error: mine/run.lock: Permission denied"
    )
    (jorch.world / "tasks.jsonl").chmod(0)
    assert jorch.line(2, "rl", "rl.yaml", through=unprivileged) == "error: tasks.jsonl: Permission denied"
    (jorch.world / "rl.yaml").chmod(0)
    line = jorch.line(2, "rl", "rl.yaml", through=unprivileged)
    assert line == "error: rl.yaml: cannot be read: Permission denied"
