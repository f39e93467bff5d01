"""A save killed at any moment leaves the checkpoint before it whole. Ten random moments of real saves."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.checkpoint import Checkpoints
from jorch.sections import CheckpointConfig

SAVING = """
import sys
from pathlib import Path
import jax.numpy as jnp
from jorch.checkpoint import Checkpoints
from jorch.sections import CheckpointConfig
with Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep=2)) as checkpoints:
    step = checkpoints.latest_step() or 0
    print("ready", flush=True)
    while True:
        step += 1
        checkpoints.save(step, {f"x{i}": jnp.full((1024, 512), step + i, jnp.float32) for i in range(8)}, {})
"""
LONGEST_S = 0.4
"""About as long as one of these saves takes (16 MiB and all of Orbax's bookkeeping) on two cores."""


def beginnings(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*tmp*")}


def kill_during_a_save(folder: Path, delay_s: float) -> None:
    """Let a process save without end; kill it that long after the beginning of one of its saves."""
    command = [sys.executable, "-c", SAVING, str(folder)]
    with subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        deadline_s = time.monotonic() + 60
        while not (any(path.name.isdecimal() for path in folder.iterdir()) and beginnings(folder)):
            assert child.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline_s, "no save began"
            time.sleep(0.002)
        time.sleep(delay_s)
        child.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    moments = random.Random(0)
    abstract = {
        f"x{i}": jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
        for i in range(8)
        for device in jax.devices()[:1]
    }
    cut_short, newest = 0, 0
    for _ in range(10):
        kill_during_a_save(tmp_path, moments.uniform(0, LONGEST_S))
        cut_short += bool(beginnings(tmp_path))
        with Checkpoints(tmp_path, CheckpointConfig(keep=2), read_only=True) as checkpoints:
            state, _, step = checkpoints.restore(abstract)
        assert step >= newest, "a checkpoint that was complete is gone"
        newest = step
        for i in range(8):
            np.testing.assert_array_equal(state[f"x{i}"], np.float32(step + i))
    assert cut_short >= 3, "hardly a kill met a save: the test proves little"
