"""The real train step, compiled ahead of time for accelerators that are not here, on a CPU.

libtpu (extra `tpu`) does it for TPUs, the CUDA plugin (extra `cuda`) for NVIDIA GPUs. XLA lays the program out in
memory as on the device. libtpu refuses one that does not fit; for a GPU its peak is held against a limit.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jorch.model.lora import LoraQwen3
from jorch.model.transformer import Qwen3, Trainable
from jorch.plan.gpus import gpu_devices
from jorch.plan.job import Job
from jorch.plan.topology import Topology
from jorch.rl.losses import policy_loss
from jorch.sharding import MESH_AXES, mesh_shape, sharding
from jorch.train.optimizer import make_optimizer
from jorch.train.sft import cross_entropy
from jorch.train.state import abstract_state
from jorch.train.step import make_train_step
from jorch.types import PackedBatch

_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu would otherwise look for on a TPU's host, with warnings; the topology's own name decides.

It also wants to be the only one on its host, for the sake of a TPU that a compiler has no use for.
"""

_INTS = ("token_ids", "positions", "segment_ids", "parents", "visible_until")


@dataclass(frozen=True)
class Compiled:
    """What XLA says of the program, in bytes on one device."""

    arguments: float
    """State and batch."""
    peak: float
    """Most memory at any moment; where the program does not fit, what XLA could not place: often temporaries alone."""
    fits: bool
    """For a TPU XLA's own verdict, for a GPU whether the peak is within the limit."""


_COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}
"""Platform -> the package that compiles for it; jorch's extra is called as the platform."""


def missing_compiler(topology: Topology) -> str | None:
    """The package that it would take to compile for a TPU or an NVIDIA GPU, where it is not installed."""
    package = _COMPILERS[topology.platform]
    return package if importlib.util.find_spec(package) is None else None


def compile_step(job: Job, topology: Topology, gpu_limit_bytes: float = math.inf) -> Compiled:
    """Compile the train step of `job` with its loss; minutes for billions of parameters.

    XLA's peak on a GPU is without CUDA's and NCCL's own memory there, for which the limit must leave room.
    """
    devices = tpu_devices(topology) if topology.platform == "tpu" else gpu_devices(topology.kind, topology.num_devices)
    shape = mesh_shape(job.mesh, len(devices))
    mesh = Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    base, optimizer = Qwen3(job.model), make_optimizer(job.optimizer, 1000)
    model: Trainable = LoraQwen3(base, job.lora) if job.lora else base
    frozen = abstract_state(base, optimizer, mesh).params if job.lora else None
    step: Any = make_train_step(model, optimizer, **_loss(job), mesh=mesh)
    arguments = (abstract_state(model, optimizer, mesh), _abstract_batch(job, mesh), 1.0, frozen)
    try:
        compiled = step.trace(*arguments).lower(lowering_platforms=(topology.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |temporaries \()([0-9.]+)([GM])", str(error))
        if used is None:
            raise
        return Compiled(0.0, float(used[1]) * (2**30 if used[2] == "G" else 2**20), fits=False)
    found = compiled.memory_analysis()
    peak = found.peak_memory_in_bytes
    fits = topology.platform == "tpu" or peak <= gpu_limit_bytes
    return Compiled(found.argument_size_in_bytes, peak, fits)


def _loss(job: Job) -> dict[str, Any]:
    if job.algorithm is None:
        return {"loss_fn": cross_entropy}
    loss_fn = partial(policy_loss, config=job.algorithm, on_policy=job.on_policy)
    return {"loss_fn": loss_fn, "with_entropy": job.algorithm.entropy_coefficient > 0}


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for, on a machine that has none; several processes may have them at once."""
    from jax.experimental import topologies

    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices


def _abstract_batch(job: Job, mesh: Mesh) -> PackedBatch:
    shape = (job.num_micro, job.batch.micro_rows, job.batch.row_tokens)
    place = sharding(mesh, shape, ("micro", "rows", "length"))

    def of(name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32 if name in _INTS else jnp.float32, sharding=place)

    return PackedBatch(*map(of, PackedBatch._fields))
