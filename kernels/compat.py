"""What differs between jax's versions, or may: every name of its Pallas backends, and what a program is traced for."""

import inspect
from typing import Any, NamedTuple

import jax
from jax._src import config
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as pltpu

plgpu: Any = mosaic_gpu
TpuParams: Any = pltpu.CompilerParams
PrefetchGrid: Any = pltpu.PrefetchScalarGridSpec
VMEM: Any = pltpu.VMEM

ASSEMBLER_REPORT = "MOSAIC_GPU_DUMP_PTXAS"
"""Environment variable under which Mosaic GPU prints registers and spills of what it compiles."""

FRUGAL = jax.__version_info__ >= (0, 12)
"""Whether Mosaic GPU leaves the gradient of k and v, at 128 columns, registers for a softcap or a window; where it does
not, up to 40 bytes of a thread would be stored away."""

_LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()

__all__ = [
    "ASSEMBLER_REPORT",
    "FRUGAL",
    "VMEM",
    "PrefetchGrid",
    "Target",
    "TpuParams",
    "interpreted",
    "load",
    "pl",
    "plgpu",
    "target",
]


def load(ref: Any, layout: Any) -> jax.Array:
    """The whole of a shared or global array into registers of that layout."""
    return plgpu.load(ref, *_LOAD_INDEX, layout=layout, optimized=False)


def interpreted() -> bool:
    """Whether Pallas interprets what is traced now, `force_tpu_interpret_mode` and its GPU twin."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


class Target(NamedTuple):
    """The device that a program is traced for."""

    backend: str
    """"cpu", "gpu" or "tpu"."""
    kind: str
    """As the device calls itself, "NVIDIA H100 80GB HBM3" or "TPU v5 lite"."""
    split: bool
    """XLA may spread what is traced over several devices, which it cannot do with a Pallas kernel."""


def target() -> Target:
    """What the mesh in context stands for, which may be a device that is not here; else the process's first device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.empty or device is None:
        first = jax.devices()[0]
        backend, kind = jax.default_backend(), first.device_kind
    else:
        backend, kind = device.platform, device.device_kind
    num_devices = jax.device_count() if mesh.empty else mesh.size
    whole = num_devices == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    return Target("gpu" if backend in ("cuda", "rocm") else backend, kind, not whole)
