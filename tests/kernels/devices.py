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


def compile_for(devices, function, *shapes):
    """`function` compiled ahead of time for the first of `devices`, the shapes are (shape, dtype) pairs."""
    mesh = Mesh(np.array(devices[:1]), ("all",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
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

_H100_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
"""
"""An H100 as XLA describes it to itself; public figures of the SXM module."""


def h100_devices():
    """One H100 that is not here, by the CUDA plugin and assembler (extra `cuda`)."""
    from jax.experimental import topologies

    # The plugin would refuse to load without cuDNN, which these kernels do not use.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    options = {"target_config": _H100_TARGET, "topology": "1x1x1"}
    return topologies.get_topology_desc("one H100", "cuda", **options).devices
