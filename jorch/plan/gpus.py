"""NVIDIA GPUs that are not here, as XLA describes them to itself; the CUDA plugin (extra `cuda`) compiles for them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEVICES_PER_HOST = 8


@dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of a device: figures of the SXM modules, as XLA's own descriptions have them."""

    name: str
    """As the device calls itself; kernels go by it."""
    capability: str
    """Fields of the compute capability."""
    num_cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    """Where a kernel asks for more than the default of 48 KiB."""
    bandwidth_bytes_s: int
    l2_bytes: int
    memory_bytes: int

    @property
    def target(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ {self.capability} }}
              core_count: {self.num_cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_ghz}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes_per_core}
              shared_memory_per_block_optin: {self.shared_bytes_per_block}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth_bytes_s} l2_cache_size: {self.l2_bytes}
              device_memory_size: {self.memory_bytes}
            }}
        """


_A100 = ("major: 8 minor: 0", 108, 64, 1.41, 167936, 166912)
_HOPPER = ("major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES", 132, 128, 1.98, 233472, 232448)
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", *_A100, 2_039_040_000_000, 41_943_040, 85_100_068_864),
    "h100": Gpu("NVIDIA H100 80GB HBM3", *_HOPPER, 3_352_320_000_000, 52_428_800, 84_942_979_072),
    "h200": Gpu("NVIDIA H200", *_HOPPER, 4_800_000_000_000, 52_428_800, 151_397_597_184),
}
"""By the kinds of `topology.parse`."""


def gpu_devices(kind: str, num_devices: int) -> Sequence[Any]:
    """Devices to compile for, on a machine that has none; in hosts of eight."""
    from jax.experimental import topologies

    # The plugin would refuse to load without cuDNN, which jorch's programs do not use.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    per_host = num_devices if num_devices <= DEVICES_PER_HOST else math.gcd(num_devices, DEVICES_PER_HOST)
    shape = f"1x{num_devices // per_host}x{per_host}"
    return topologies.get_topology_desc(kind, "cuda", target_config=GPUS[kind].target, topology=shape).devices
