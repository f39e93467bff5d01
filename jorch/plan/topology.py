"""Accelerators by name: how many, how much memory each. Needs no jax."""

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

    @property
    def kind(self) -> str:
        """ "v5e", "h100", "cpu", ..."""
        return self.name.partition(":")[0]

    @property
    def platform(self) -> str:
        """As jax calls it: "tpu", "cuda" or "cpu"."""
        return "tpu" if self.kind in _TPUS else "cuda" if self.kind in _GPUS else "cpu"


_TPUS = {"v5e": 15.75, "v5p": 95.0, "v6e": 31.25}
_GPUS = {"a100": 80e9 / GIB, "h100": 80e9 / GIB, "h200": 141e9 / GIB}
"""Kind -> memory in GiB, from the vendors' data sheets; v5e's as XLA reports it."""


def parse(text: str) -> Topology:
    """ "v5e:4x4", "v5p:2x2x4", "h100:8" or "cpu:8". Raises ValueError for anything else."""
    kind, _, shape = text.partition(":")
    known = {**_TPUS, **_GPUS}
    if re.fullmatch(r"\d+(x\d+){1,2}" if kind in _TPUS else r"\d+", shape):
        num_devices = math.prod(map(int, shape.split("x")))
        if num_devices > 0 and kind == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Topology(text, num_devices, memory / num_devices)
        if num_devices > 0 and kind in known:
            return Topology(text, num_devices, known[kind] * GIB)
    raise ValueError(
        f"--topology {text!r}: write KIND:SHAPE, e.g. v5e:4x4, v5p:2x2x4, h100:8 or cpu:8; "
        f"kinds: {', '.join(known)}, cpu"
    )
