"""Tracing and compiling for a device that is not here."""

import contextlib
import os

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


@contextlib.contextmanager
def interpreted(device: AbstractDevice, params=True):
    """What is traced inside takes the paths of `device`, and Pallas interprets their kernels.

    `params`: True runs a kernel as XLA would run its steps one by one; interpreter parameters simulate the device's
    memories.
    """
    mesh = AbstractMesh((1,), ("all",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode(params):
        yield


V5E = AbstractDevice("TPU v5 lite", 1, "tpu")


def gpu_races():
    """Whether the latest interpreted GPU kernel with race detection had one; forgets what the interpreter holds."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    found = interpret_pallas_call.get_races().races_found
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    return found


def gpu_memories():
    """Interpreter parameters that simulate a GPU's memories, barriers and copies, and look for races."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def tpu_races():
    """Whether the latest interpreted TPU kernel with race detection had one."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@contextlib.contextmanager
def for_one_of(devices):
    """Programs that are traced inside are meant for the first of `devices`; gives where their arguments lie."""
    mesh = Mesh(np.array(devices[:1]), ("all",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield NamedSharding(mesh, PartitionSpec())


def compile_for(devices, function, *shapes):
    """`function` compiled ahead of time for the first of `devices`, the shapes are (shape, dtype) pairs."""
    with for_one_of(devices) as place:
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
        return jax.jit(function).trace(*arguments).lower().compile()


def tpu_devices(topology):
    """Those of a TPU that is not here, "v5e:2x2", by libtpu."""
    from jax.experimental import topologies

    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
    ):
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")


def h100_devices():
    """One H100 that is not here, by the CUDA plugin and assembler (extra `cuda`)."""
    from jorch.plan.gpus import gpu_devices

    return gpu_devices("h100", 1)
