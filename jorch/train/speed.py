"""How fast a step was: its time in parts, tokens per second, model FLOP/s and MFU (`jorch/flops.py` counts them)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

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
        times = split(now - self._began, data_s=self._parts["data"], compute_s=self._parts["compute"])
        self._began, self._parts = now, dict.fromkeys(self._parts, 0.0)
        return times


def split(step_s: float, *, data_s: float, compute_s: float) -> dict[str, float]:
    """The metrics of a step's time and its three parts, of which the host's is what the others leave."""
    parts = {"step": step_s, "data": data_s, "compute": compute_s, "host": step_s - data_s - compute_s}
    return {f"time/{name}_s": seconds for name, seconds in parts.items()}


class Work(NamedTuple):
    """What a step computes, over all devices."""

    num_tokens: int
    """In the rows, padding apart; a prompt that siblings share counts once."""
    num_pairs: int
    """(query, key) of tokens that see each other: causal attention, counted once."""
    num_dense_pairs: int
    """The same if every token saw a whole row."""


def work_of(batch: PackedBatch) -> Work:
    """Of a host batch for all devices."""
    held = np.asarray(batch.segment_ids) > 0
    num_tokens = int(held.sum())
    # A token sees itself and its predecessors, of whom its position is the number.
    num_pairs = int((np.asarray(batch.positions)[held] + 1).sum())
    return Work(num_tokens, num_pairs, num_tokens * held.shape[-1])


def speed(
    config: ModelConfig, work: Work, seconds: float, peak: float | None = None, lora: LoraConfig | None = None
) -> dict[str, float]:
    """The metrics speed/* of a step on all devices of the run; MFU where its device's peak is in jorch's table.

    Args:
        peak: FLOP/s of one device, in place of the table's.
    """
    device_seconds = seconds * jax.device_count()
    peak = peak or peak_flops(jax.devices()[0].device_kind)
    metrics = {"speed/tokens_per_s_per_device": work.num_tokens / device_seconds}
    for suffix, num_pairs in (("", work.num_pairs), ("_dense", work.num_dense_pairs)):
        flops = train_flops(config, work.num_tokens, num_pairs, lora) / device_seconds
        metrics[f"speed/flops_per_s_per_device{suffix}"] = flops
        if peak is not None:
            metrics[f"speed/mfu{suffix}"] = flops / peak
    return metrics
