"""N steps equal k + Ctrl-C + resume + kill -9 + resume + the rest, bit by bit. The whole way once;
test_interrupted_runs.py has the other moments.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jorch import config_io
from jorch.checkpoint import Checkpoints
from jorch.config import RlConfig
from jorch.export import pretrained
from jorch.sections import MeshConfig
from jorch.sharding import make_mesh
from jorch.train.optimizer import make_optimizer
from jorch.train.state import TrainState, abstract_state

pytestmark = pytest.mark.slow


def steps_done(world: Path) -> int:
    path = world / "rl" / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def final_state(world: Path) -> tuple[TrainState, int]:
    """Parameters, optimizer state and step count of the newest checkpoint."""
    config = config_io.load(world / "rl" / "config.yaml", RlConfig)
    mesh = make_mesh(MeshConfig())
    start = pretrained.load("base", mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(world / "rl" / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        state, _, step = checkpoints.restore(abstract_state(start.model, optimizer, mesh))
    return state, step


def test_a_run_cut_short_twice_ends_like_one_that_was_not(jorch: Any, reference: Path) -> None:
    child = jorch.start("rl", "rl.yaml")
    jorch.wait(lambda: steps_done(jorch.world) >= 1, "a step")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, stderr = child.communicate(timeout=200)
    assert (child.returncode, stderr) == (130, "jorch: interrupted; go on with: jorch rl rl.yaml --resume\n")
    assert jorch.stray() == [], "the tool server is gone"
    interrupted_at = steps_done(jorch.world)

    child = jorch.start("rl", "rl.yaml", "--resume")
    jorch.wait(lambda: steps_done(jorch.world) > interrupted_at, "a further step")
    child.kill()
    child.communicate()
    jorch.wait(lambda: jorch.stray() == [], "the tool server's end", timeout_s=30)
    assert 1 <= interrupted_at < steps_done(jorch.world) < 4, "neither cut came in time"

    result = jorch.run("rl", "rl.yaml", "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert jorch.same_as(reference)
    (state, step), (expected, expected_step) = final_state(jorch.world), final_state(reference)
    assert step == expected_step == 4
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    moments = [leaf for leaf in jax.tree.leaves(expected.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(expected.params))
    assert all(np.asarray(moment).any() for moment in moments), "every moment took part"


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    main: Callable[..., str], world: Path, reference: Path
) -> None:
    shutil.copytree(reference / "rl", world / "rl")
    for path in (world / "rl" / "checkpoints" / "4").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-50])
    line = main(2, "rl", "rl.yaml", "--resume")
    assert line.startswith("error: checkpoint rl/checkpoints/4 cannot be read (")
    assert line.endswith("); remove that folder to go on from step 3, or pass --fresh to start again")
    assert steps_done(world) == 4, "nothing is lost"
