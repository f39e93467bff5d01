"""How fast a step was: its time in parts, tokens per second and device, model FLOPs utilisation (`jorch/flops.py`)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from jorch.flops import peak_flops, train_flops
from jorch.sections import LoraConfig, ModelConfig
from jorch.types import PackedBatch


class Clock:
    """Seconds since the last `lap`, split into named parts; what is in no part is the host's own."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._parts = {"data": 0.0, "compute": 0.0}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """The metrics time/*_s, which begin at 0 again."""
        now = time.perf_counter()
        step_s = now - self._began
        times = {"step": step_s, **self._parts, "host": step_s - sum(self._parts.values())}
        self._began, self._parts = now, dict.fromkeys(self._parts, 0.0)
        return {f"time/{name}_s": seconds for name, seconds in times.items()}


def speed(
    config: ModelConfig,
    batch: PackedBatch,
    step_s: float,
    device_kind: str,
    num_devices: int,
    lora: LoraConfig | None = None,
) -> dict[str, float]:
    """The metrics speed/* of a step over a host batch; without MFU where the device's peak is unknown."""
    held = np.asarray(batch.segment_ids) > 0
    num_tokens = int(held.sum())
    metrics = {"speed/tokens_per_s_per_device": num_tokens / step_s / num_devices}
    peak = peak_flops(device_kind)
    if peak is None:
        return metrics
    # A token sees itself and its predecessors, of whom its position is the number.
    pairs = {"mfu": int((np.asarray(batch.positions)[held] + 1).sum()), "mfu_dense": num_tokens * held.shape[-1]}
    available = step_s * num_devices * peak
    return metrics | {
        f"speed/{name}": train_flops(config, num_tokens, p, lora) / available for name, p in pairs.items()
    }


def device_kind() -> str:
    """Of the devices that the run is on."""
    return jax.devices()[0].device_kind
