"""Checkpoints hold exactly what was saved, appear whole or not at all, and say so when they are damaged."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jorch.checkpoint import Checkpoints, describe
from jorch.config import SftConfig
from jorch.sections import CheckpointConfig
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


def opened(folder, *, read_only=False, **config):
    return Checkpoints(folder, CheckpointConfig(**config), read_only=read_only)


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


def test_arrays_of_another_shape_are_refused_by_name(tmp_path, mesh):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"cannot be read \(params/embed has shape \(8, 6\); this run's is \(8, 5\)\)"):
        restore(tmp_path, mesh, like=make_state(width=5))
    other = make_state()
    other.opt_state["nu"] = other.opt_state.pop("count")
    with pytest.raises(ValueError, match=r"cannot be read \(opt_state/count is one array too many\)"):
        restore(tmp_path, mesh, like=other)


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused_by_the_difference(tmp_path, tiny_config, mesh):
    config = SftConfig(
        out="o", model=tiny_config(), demonstrations="miniature", steps=1, batch={"row_tokens": 8, "micro_rows": 1},
        optimizer={"learning_rate": 1.0},
    )  # fmt: skip
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), describe(config, tiny_config(), "a" * 64))

    def refusal(model, digest):
        with opened(tmp_path, read_only=True) as checkpoints, pytest.raises(ValueError) as caught:
            checkpoints.restore(abstract(make_state(), mesh), describe(config, model, digest))
        assert caught.traceback[-1].frame.f_globals["__name__"] == "jorch.checkpoint"
        return str(caught.value).removeprefix(f"checkpoint {tmp_path / '1'} is of another ")

    hint = "; choose another out=, or pass --fresh to start again"
    other = tiny_config(hidden_size=32, rope_theta=1e6)
    assert (
        refusal(other, "a" * 64)
        == "model: hidden_size=16 there, 32 here, rope_theta=100.0 there, 1000000.0 here" + hint
    )
    assert refusal(tiny_config(), "b" * 64) == f"tokenizer: sha256 {'a' * 12}... there, {'b' * 12}... here" + hint
    same_computed_otherwise = tiny_config(param_dtype="bfloat16", remat="full")
    with opened(tmp_path) as checkpoints:
        _, meta, _ = checkpoints.restore(
            abstract(make_state(), mesh), describe(config, same_computed_otherwise, "a" * 64)
        )
    assert SftConfig.model_validate(meta["config"]) == config


def test_it_is_restored_in_the_dtypes_asked_for(tmp_path, mesh):
    save(tmp_path, 1)

    def cast(dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, make_state(1))

    narrow, wide = cast(jnp.bfloat16), cast(jnp.float32)
    assert bits(restore(tmp_path, mesh, like=narrow)[0]) == bits(narrow)
    assert bits(restore(tmp_path, mesh, like=wide)[0]) == bits(wide)


ELSEWHERE = """
import sys
import jax, numpy as np
from pathlib import Path
from jorch.checkpoint import Checkpoints
from jorch.sections import CheckpointConfig, MeshConfig
from jorch.sharding import make_mesh, sharding
folder = Path(sys.argv[1])
def placed(mesh):
    rows = [sharding(mesh, (8, 6), (axis, None)) for axis in ("embed", "mlp")]
    x, y = np.arange(48.0, dtype=np.float32).reshape(8, 6), np.arange(48, dtype=np.int32).reshape(8, 6)
    return {"x": jax.device_put(x, rows[0]), "y": jax.device_put(y, rows[1])}
four_two, eight = make_mesh(MeshConfig(fsdp=4, tensor=2)), make_mesh(MeshConfig(fsdp=2, tensor=4))
with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    checkpoints.save(1, placed(four_two), {})
with Checkpoints(folder, CheckpointConfig()) as checkpoints:
    wanted = placed(eight)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    state, *_ = checkpoints.restore(abstract)
assert all(state[k].sharding == wanted[k].sharding for k in state)
assert all((np.asarray(state[k]) == np.asarray(wanted[k])).all() for k in state)
"""


def test_it_is_restored_onto_another_mesh_and_number_of_devices(tmp_path, mesh):
    """From fsdp 4, tensor 2 onto fsdp 2, tensor 4, and onto one device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    expected = {"x": jnp.arange(48.0).reshape(8, 6), "y": jnp.arange(48).reshape(8, 6)}
    assert bits(restore(tmp_path, mesh, like=expected)[0]) == bits(expected)


@pytest.mark.parametrize(("best_is", "kept"), [("highest", ["2", "5", "6"]), ("lowest", ["4", "5", "6"])])
def test_the_best_is_kept_beside_the_latest(best_is, kept, tmp_path):
    """By the metric's value; neither a missing one nor NaN wins."""
    values = {2: 0.9, 3: 0.5, 4: 0.1, 5: math.nan, 6: 0.3}
    options = {"keep": 2, "best_metric": "reward/mean", "best_is": best_is}
    with opened(tmp_path, **options) as checkpoints:
        checkpoints.save(1, make_state(), META)
        for step in (2, 3, 4):
            checkpoints.save(step, make_state(step), META, metrics={"reward/mean": values[step], "train/loss": 0.0})
    with opened(tmp_path, **options) as checkpoints:  # a resumed run knows them still
        for step in (5, 6):
            checkpoints.save(step, make_state(step), META, metrics={"reward/mean": values[step]})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == kept


def test_an_older_checkpoint_by_its_step(tmp_path, mesh):
    save(tmp_path, 1, 2, keep=2)
    with opened(tmp_path, read_only=True) as checkpoints:
        state, _, step = checkpoints.restore(abstract(make_state(), mesh), step=1)
        assert (step, bits(state)) == (1, bits(make_state(1)))
        with pytest.raises(ValueError, match=r"has no checkpoint of step 3; there are 1, 2$"):
            checkpoints.restore(abstract(make_state(), mesh), step=3)


def test_an_unknown_metric_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"best_metric='reward/men' is no metric; did you mean 'reward/mean'\?"):
        opened(tmp_path, best_metric="reward/men")


def test_without_ocdbt_too_what_is_restored_is_what_was_saved(tmp_path, mesh):
    save(tmp_path, 1, ocdbt=False)
    assert not list(tmp_path.rglob("manifest.ocdbt"))
    assert bits(restore(tmp_path, mesh)[0]) == bits(make_state(1))


def test_after_a_failure_the_first_error_is_reported(tmp_path):
    with pytest.raises(KeyError, match="the cause"):
        with opened(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(), META)
            raise KeyError("the cause")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1, "the save in flight was finished"


def read_all(arrays, name, shape, step):
    return np.concatenate([arrays.rows(name, i, min(i + step, shape[0]), shape) for i in range(0, shape[0], step)])


@pytest.mark.parametrize("ocdbt", [True, False])
def test_rows_of_an_array_are_read_alone(ocdbt, tmp_path):
    save(tmp_path, 1, 2, ocdbt=ocdbt)
    expected = make_state(2).params
    with opened(tmp_path, read_only=True) as checkpoints:
        arrays, meta, step = checkpoints.open({})
        assert (step, meta) == (2, META)
        np.testing.assert_array_equal(read_all(arrays, "params/embed", (8, 6), 3), expected["embed"])
        q = read_all(arrays, "params/layers/q", (2, 6, 4), 1)
        np.testing.assert_array_equal(q, expected["layers"]["q"])
        with pytest.raises(ValueError, match=r"params/embed has shape \(8, 6\); this run's is \(8, 5\)"):
            arrays.rows("params/embed", 0, 8, (8, 5))
        with pytest.raises(ValueError, match=r"checkpoint .* cannot be read \(.*\); remove that folder to go on"):
            arrays.rows("params/head", 0, 8, (8, 6))


def test_a_stack_of_layers_lies_on_disk_by_layers(tmp_path):
    save(tmp_path, 1, ocdbt=False)
    stack = tmp_path / "1" / "state" / "params.layers.q" / "c"
    assert len([path for path in stack.rglob("*") if path.is_file()]) == 2


def test_a_damaged_layer_is_named_when_the_last_one_is_read(tmp_path):
    """One layer lies in the place of another: tensorstore's own checks see nothing."""
    save(tmp_path, 1, ocdbt=False)
    stack = tmp_path / "1" / "state" / "params.layers.q" / "c"
    shutil.copyfile(stack / "1" / "0" / "0", stack / "0" / "0" / "0")
    with opened(tmp_path, read_only=True) as checkpoints:
        arrays, *_ = checkpoints.open({})
        arrays.rows("params/layers/q", 0, 1, (2, 6, 4))
        with pytest.raises(ValueError, match=r"cannot be read \(params/layers/q does not match its checksum\)"):
            arrays.rows("params/layers/q", 1, 2, (2, 6, 4))


def test_what_is_read_outlives_the_checkpoint(tmp_path):
    """A run that goes on removes its older checkpoints."""
    save(tmp_path / "checkpoints", 1)
    with opened(tmp_path / "checkpoints", read_only=True) as checkpoints:
        arrays, *_ = checkpoints.open({})
        with arrays.kept(tmp_path):
            shutil.rmtree(tmp_path / "checkpoints" / "1")
            np.testing.assert_array_equal(read_all(arrays, "params/embed", (8, 6), 3), make_state(1).params["embed"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_checkpoint_with_one_checksum_for_all_arrays(tmp_path, mesh):
    """As checkpoints were before every array had its own."""
    numbers = [np.asarray(x).view(f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(make_state(1))]
    total = sum((2 * n + 1) * int(np.sum(x, dtype=np.uint64)) for n, x in enumerate(numbers, 1)) % 2**32
    for step, checksum in ((1, total), (2, total ^ 1)):
        with ocp.training.Checkpointer(tmp_path) as older:
            older.save_checkpointables(step, {"state": make_state(1), "meta": META | {"checksum": checksum}})
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.open({}, step=1)[0] is None
        state, *rest = checkpoints.restore(abstract(make_state(), mesh), step=1)
        assert (bits(state), rest) == (bits(make_state(1)), [META, 1])
        with pytest.raises(ValueError, match="its content does not match its checksum"):
            checkpoints.restore(abstract(make_state(), mesh), step=2)
