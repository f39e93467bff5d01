"""Checkpoints hold exactly what was saved, appear whole or not at all, and say so when they are damaged."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.checkpoint import Checkpoints
from jorch.config import CheckpointConfig
from jorch.sharding import replicated
from jorch.train.state import TrainState

META = {"tokenizer_digest": "abc", "seed": 7}


def make_state(seed=0, width=6):
    rng = np.random.default_rng(seed)
    params = {"embed": rng.normal(size=(8, width)), "layers": {"q": rng.normal(size=(2, width, 4))}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    moments = jax.tree.map(lambda x: jnp.asarray(x * 1e-9, jnp.bfloat16), params)
    return TrainState(jnp.int32(seed), params, {"mu": moments, "count": jnp.int32(3)})


def abstract(state, mesh):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), state)


def bits(state):
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def opened(folder, every_steps=1, keep=2, **options):
    return Checkpoints(folder, CheckpointConfig(every_steps=every_steps, keep=keep), **options)


def save(folder, *steps, **options):
    """Checkpoints of `make_state(step)`; every one finished."""
    for step in steps:
        with opened(folder, **options) as checkpoints:
            checkpoints.save(step, make_state(step), META)


def restore(folder, mesh, like=None):
    with opened(folder) as checkpoints:
        return checkpoints.restore(abstract(like or make_state(), mesh))


def test_what_is_restored_is_what_was_saved(tmp_path, mesh):
    save(tmp_path, 1, 2)
    state, meta, step = restore(tmp_path, mesh)
    assert (step, meta) == (2, META)
    assert isinstance(state, TrainState)
    assert bits(state) == bits(make_state(2))


def test_the_callers_next_step_does_not_reach_into_a_save(tmp_path, mesh):
    """A train step donates the state right after it was handed over for saving in the background."""
    update = jax.jit(lambda state: jax.tree.map(lambda x: x * 2 + 1, state), donate_argnums=0)
    state, expected = make_state(), {}
    with opened(tmp_path, keep=8) as checkpoints:
        for step in range(6):
            expected[step] = bits(state)
            checkpoints.save(step, state, META)
            state = update(state)
    for step in range(5, -1, -1):
        restored, _, restored_step = restore(tmp_path, mesh)
        assert restored_step == step
        assert bits(restored) == expected[step]
        shutil.rmtree(tmp_path / str(step))


def test_interval_force_and_number_kept(tmp_path):
    with opened(tmp_path, every_steps=3, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in range(8):
            checkpoints.save(step, make_state(step), META, force=step == 7)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["6", "7"]
    with opened(tmp_path, every_steps=3) as checkpoints:
        assert checkpoints.latest_step() == 7
        checkpoints.save(7, make_state(99), META, force=True)  # a resumed run saves where it begins
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["6", "7"]


def half_written(folder: Path) -> Path:
    """What a kill leaves: a folder that was not renamed yet, with part of its content."""
    partial = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", partial)
    for path in sorted(partial.rglob("*"))[::2]:
        if path.is_file():
            path.unlink()
    return partial


def test_a_half_written_checkpoint_is_ignored_and_cleared(tmp_path, mesh):
    save(tmp_path, 1, 2)
    partial = half_written(tmp_path)
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert partial.exists(), "a view must not touch what another process writes"
    state, _, step = restore(tmp_path, mesh)
    assert step == 2
    assert bits(state) == bits(make_state(2))
    assert not partial.exists()
    save(tmp_path, 9)
    assert restore(tmp_path, mesh)[2] == 9


def truncate(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 40:
            path.write_bytes(path.read_bytes()[:40])


def flip_bits(folder: Path) -> None:
    """In the arrays' own bytes, which are far from the files' ends."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        for i in range(len(content) // 3, len(content) // 3 + 8):
            content[i] ^= 255
        path.write_bytes(content)


def empty(folder: Path) -> None:
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize("damage", [truncate, flip_bits, empty])
def test_a_damaged_checkpoint_is_one_line_that_names_its_folder(damage, tmp_path, mesh):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with pytest.raises(ValueError) as caught:
        restore(tmp_path, mesh)
    line = str(caught.value)
    assert line.startswith(f"checkpoint {tmp_path / '2'} cannot be read (")
    assert line.endswith("); remove that folder to go on from step 1, or pass --fresh to start again")
    assert "\n" not in line
    assert caught.traceback[-1].frame.f_globals["__name__"] == "jorch.checkpoint"  # else the CLI shows a traceback
    shutil.rmtree(tmp_path / "2")
    state, _, step = restore(tmp_path, mesh)
    assert step == 1
    assert bits(state) == bits(make_state(1))


def test_a_damaged_only_checkpoint_leaves_starting_again(tmp_path, mesh):
    save(tmp_path, 1)
    truncate(tmp_path / "1")
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); pass --fresh to start again"):
        restore(tmp_path, mesh)


def test_another_models_checkpoint_is_refused(tmp_path, mesh):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"checkpoint .*1 cannot be read \("):
        restore(tmp_path, mesh, like=make_state(width=5))


def test_after_a_failure_the_first_error_is_reported(tmp_path):
    with pytest.raises(KeyError, match="the cause"):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(), META)
            raise KeyError("the cause")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1, "the save in flight was finished"
