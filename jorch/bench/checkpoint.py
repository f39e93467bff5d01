"""`jorch bench checkpoint`: what saving and restoring a state costs, with OCDBT and without (`checkpoint.ocdbt`)."""

import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jorch.checkpoint import Checkpoints
from jorch.metrics import stage
from jorch.run_folder import atomic_write
from jorch.sections import CheckpointConfig, MeshConfig
from jorch.sharding import make_mesh, sharding
from jorch.versions import versions

NUM_LAYERS, D, F = 12, 1024, 4096
"""1.5 GB of float32 in a state's shape: stacked matrices, and two moments of each."""
NUM_TIMINGS = 5


def run(json_path: Path | None) -> None:
    """Measure both in turns in a temporary folder, print medians, and write the same numbers to `json_path`."""
    state = make_state()
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    measured: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with stage("checkpoints", 2 * NUM_TIMINGS) as progress, tempfile.TemporaryDirectory(dir=".") as scratch:
        for number in range(NUM_TIMINGS):
            for ocdbt, timings in measured.items():
                timings.append(measure(Path(scratch, f"{ocdbt}-{number}"), state, ocdbt))
                progress.advance()
    found = {f"ocdbt={'true' if ocdbt else 'false'}": _medians(timings) for ocdbt, timings in measured.items()}
    where = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {datetime.date.today()}"
    _print(found, f"{num_bytes / 1e9:.2f} GB of state; medians of {NUM_TIMINGS}; {where}")
    if json_path is not None:
        content = {"device": where, "versions": versions(), "state_bytes": num_bytes, "timings": found}
        atomic_write(json_path, json.dumps(content, indent=1) + "\n")


def make_state() -> Any:
    """Random, since storage compresses; sharded over all devices."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count()))
    shapes = {"q": (NUM_LAYERS, D, D), "o": (NUM_LAYERS, D, D), "up": (NUM_LAYERS, D, F), "gate": (NUM_LAYERS, D, F)}
    keys = jax.random.split(jax.random.key(0), 3)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        one = jax.random.split(key, len(shapes))
        places = {name: sharding(mesh, shape, ("layers", "embed", None)) for name, shape in shapes.items()}
        return {
            name: jax.device_put(jax.random.normal(k, shape), places[name])
            for k, (name, shape) in zip(one, shapes.items(), strict=True)
        }

    return jax.block_until_ready({name: draw(key) for name, key in zip(("params", "mu", "nu"), keys, strict=True)})


def measure(folder: Path, state: Any, ocdbt: bool) -> dict[str, float]:
    """Seconds, files and bytes of one save and one restore, which checks the content."""
    config = CheckpointConfig(ocdbt=ocdbt)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with Checkpoints(folder, config) as checkpoints:
        began = time.perf_counter()
        checkpoints.save(1, state, {})
        returned = time.perf_counter()
        checkpoints.wait()
        saved = time.perf_counter()
        restored, *_ = jax.block_until_ready(checkpoints.restore(abstract))
        ended = time.perf_counter()
    assert jnp.array_equal(restored["nu"]["up"][-1], state["nu"]["up"][-1])
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "save_returns_s": returned - began,
        "save_s": saved - began,
        "restore_s": ended - saved,
        "files": float(len(files)),
        "stored_bytes": float(sum(path.stat().st_size for path in files)),
    }


def _medians(timings: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(t[name] for t in timings) for name in timings[0]}


def _print(found: dict[str, dict[str, float]], caption: str) -> None:
    table = Table(caption=caption, caption_justify="left")
    for title in ("", "save returns, s", "save, s", "restore, s", "files", "stored, MB"):
        table.add_column(title, justify="right" if title else "left")
    for name, m in found.items():
        seconds = (f"{m[key]:.2f}" for key in ("save_returns_s", "save_s", "restore_s"))
        table.add_row(name, *seconds, f"{m['files']:.0f}", f"{m['stored_bytes'] / 1e6:,.0f}")
    Console().print(table)
