"""Block sizes of tiled attention: what the user measured, else what ships, else a rule of thumb.

A file of block sizes is JSON, by device kind a list of [tokens, block_q, block_k, stages], for rows of at least that
length; `stages` may be left out, and only the Hopper gradients have them.
`python -m kernels.tune` measures and writes one; nothing is ever measured inside a job.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

from kernels.compat import Target

USER_FILE = Path.home() / ".config" / "jorch" / "kernel_blocks.json"
SHIPPED_FILE = Path(__file__).with_name("kernel_blocks.json")
LANES = 128


class Blocks(NamedTuple):
    """Queries and keys of a tile, and how many halves of tiles the Hopper gradients keep under way."""

    q: int
    k: int
    stages: int = 4

    def within(self, block: int) -> "Blocks":
        """The nearest to these where queries lie in pieces of `block` tokens: a tile holds queries of one piece."""
        q = math.gcd(self.q, block)
        return self._replace(q=q, k=self.k if self.k % q == 0 else math.gcd(self.k, q))


def blocks(target: Target, num_tokens: int, files: tuple[Path, ...] = (USER_FILE, SHIPPED_FILE)) -> Blocks:
    """Block sizes for rows of `num_tokens` on a device.

    Raises:
        ValueError: a file that holds something else than block sizes.
    """
    for file in files:
        fitting = [entry for entry in read(file).get(target.kind, ()) if entry[0] <= num_tokens]
        if fitting:
            return max(fitting)[1]
    return rule_of_thumb(target, num_tokens)


def rule_of_thumb(target: Target, num_tokens: int) -> Blocks:
    """What suits the kind of device, no more than the row needs."""
    if target.backend == "tpu":
        block = min(512, num_tokens + -num_tokens % LANES)
        return Blocks(block, block)
    return Blocks(128, 128) if target.backend == "gpu" else Blocks(256, 256)


@functools.cache
def read(file: Path) -> dict[str, list[tuple[int, Blocks]]]:
    """The entries of a file, read once a process; none where there is no file."""
    if not file.exists():
        return {}
    try:
        return {
            kind: [(int(t), Blocks(*map(int, of))) for t, *of in entries] for kind, entries in _parsed(file).items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f'{file}: not block sizes; must be JSON like {{"TPU v5 lite": [[8192, 512, 1024]]}}, tokens and the block '
            "sizes of queries and keys; write it with `python -m kernels.tune`, or remove it"
        ) from None


def _parsed(file: Path) -> dict[str, list]:
    return json.loads(file.read_text(encoding="utf-8"))
