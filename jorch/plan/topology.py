"""Accelerators by name: how many, how much memory, how fast. Needs no jax."""

import math
import os
import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Topology:
    """Devices that a run would get."""

    name: str
    """As the user wrote it: "v5e:4x4", "h100:8"."""
    num_devices: int
    memory_bytes: float
    """Per device, as far as a program can have it."""
    peak_flops: float | None
    """bfloat16, dense, per second and device; None where it says nothing."""

    @property
    def is_tpu(self) -> bool:
        return self.name.split(":")[0] in _TPUS


_TPUS = {"v5e": (15.75, 197e12), "v5p": (95.0, 459e12), "v6e": (31.25, 918e12)}
_GPUS = {"a100": (80e9 / GIB, 312e12), "h100": (80e9 / GIB, 989e12), "h200": (141e9 / GIB, 989e12)}
"""Kind -> (memory in GiB, bfloat16 FLOP/s), from the vendors' data sheets; v5e's memory as XLA reports it."""


def parse(text: str) -> Topology:
    """ "v5e:4x4", "v5p:2x2x4", "h100:8" or "cpu:8". Raises ValueError for anything else."""
    kind, _, shape = text.partition(":")
    known = {**_TPUS, **_GPUS}
    if re.fullmatch(r"\d+(x\d+){1,2}" if kind in _TPUS else r"\d+", shape):
        num_devices = math.prod(map(int, shape.split("x")))
        if num_devices > 0 and kind == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Topology(text, num_devices, memory / num_devices, None)
        if num_devices > 0 and kind in known:
            memory_gib, peak = known[kind]
            return Topology(text, num_devices, memory_gib * GIB, peak)
    raise ValueError(
        f"--topology {text!r}: write KIND:SHAPE, e.g. v5e:4x4, v5p:2x2x4, h100:8 or cpu:8; "
        f"kinds: {', '.join(known)}, cpu"
    )
