"""`python -m kernels.tune`: which block sizes of tiled attention are fastest here, written where attention looks.

Lists the candidates and compiles them all; drops those that the compiler refuses (shared memory, VMEM) and those that
spill more registers than the rule of thumb does; times forward and backward of the rest on packed rows, and keeps the
fastest.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.api import attention
from kernels.attention.tiles import tile
from kernels.compat import ASSEMBLER_REPORT, Target, target
from kernels.shapes import QWEN3_8B, SMALL, Shapes, packed
from kernels.tuning import USER_FILE, Blocks, read, rule_of_thumb

NUM_TIMINGS = 20
TIE = 0.02
"""A candidate must beat the rule of thumb by this share of its time; otherwise the rule stays."""


class Compiled(NamedTuple):
    """What the compiler makes of a candidate."""

    blocks: Blocks
    program: Any  # None where it was refused
    spilled_bytes: int  # of a thread, in all kernels together; 0 where the compiler does not tell
    refusal: str | None


class Candidate(NamedTuple):
    """Block sizes with what became of them."""

    blocks: Blocks
    median_s: float | None
    refusal: str | None


def candidates(here: Target, num_tokens: int) -> list[Blocks]:
    """What to try, the rule of thumb first. The Hopper kernels' tiles are of one size: what varies is how
    much their gradients have under way."""
    first = rule_of_thumb(here, num_tokens)
    if here.backend == "gpu":
        return [first, *(first._replace(stages=n) for n in (2, 3, 5))]
    sizes = [n for n in (128, 256, 512, 1024, 2048) if n <= num_tokens]
    others = [Blocks(q, k) for q in sizes for k in sizes if max(q, k) <= 8 * min(q, k)]
    return [first, *(blocks for blocks in others if blocks != first)]


def compiled(num_tokens: int, shapes: Shapes, blocks: Blocks, sharding: Any = None) -> Compiled:
    """Forward and backward compiled for this process's device, or for that of `sharding`, which need not be here."""
    heads = [((1, num_tokens, n, shapes.H), shapes.dtype) for n in (shapes.N, shapes.K, shapes.K)]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in (*heads, ((1, num_tokens), "int32"))
    ]
    try:
        with _assembler_report() as report:
            program = jax.jit(_gradient(blocks, shapes.H)).lower(*arguments).compile()
            spills = re.findall(r"(\d+) bytes spill stores", report())
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return Compiled(blocks, None, 0, str(error).splitlines()[0])
    return Compiled(blocks, program, sum(map(int, spills)), None)


@contextlib.contextmanager
def _assembler_report() -> Iterator[Callable[[], str]]:
    """What CUDA's assembler prints of the kernels compiled meanwhile, which it does past Python."""
    with tempfile.TemporaryFile() as file:

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        before, kept = os.environ.get(ASSEMBLER_REPORT), [os.dup(fd) for fd in (1, 2)]
        try:
            os.environ[ASSEMBLER_REPORT] = "1"
            sys.stdout.flush()
            for fd in (1, 2):
                os.dup2(file.fileno(), fd)
            yield text
        finally:
            sys.stdout.flush()
            for fd, own in zip((1, 2), kept, strict=True):
                os.dup2(own, fd)
                os.close(own)
            os.environ.pop(ASSEMBLER_REPORT)
            if before is not None:
                os.environ[ASSEMBLER_REPORT] = before


def pruned(all_compiled: list[Compiled]) -> list[Compiled]:
    """With a refusal too for those that spill more registers than the first, the rule of thumb, does."""
    most = all_compiled[0].spilled_bytes

    def of(one: Compiled) -> Compiled:
        if one.refusal or one.spilled_bytes <= most:
            return one
        return one._replace(program=None, refusal=f"spills {one.spilled_bytes} bytes a thread, the first {most}")

    return [of(one) for one in all_compiled]


def timed(num_tokens: int, shapes: Shapes, num_timings: int, kept: list[Compiled]) -> Iterator[Candidate]:
    """The median time of each that was not refused."""
    rng = np.random.default_rng(0)
    heads = (shapes.N, shapes.K, shapes.K)
    q, k, v = (jnp.asarray(rng.standard_normal((1, num_tokens, n, shapes.H)), shapes.dtype) for n in heads)
    end = jnp.asarray(packed(num_tokens)[None])
    for blocks, program, _, refusal in kept:
        if program is None:
            yield Candidate(blocks, None, refusal)
            continue
        jax.block_until_ready(program(q, k, v, end))
        seconds = []
        for _ in range(num_timings):
            began = time.perf_counter()
            jax.block_until_ready(program(q, k, v, end))
            seconds.append(time.perf_counter() - began)
        yield Candidate(blocks, float(np.median(seconds)), None)


def _gradient(blocks: Blocks, H: int) -> Callable[..., Any]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
        mask = tile(end, block_q=blocks.q, block_k=blocks.k, stages=blocks.stages)
        return jnp.sum(attention(q, k, v, mask=mask, scale=H**-0.5).astype(jnp.float32))

    return jax.value_and_grad(loss, (0, 1, 2))


def fastest(measured: list[Candidate]) -> Candidate:
    """The fastest; the first, which is the rule of thumb, where the difference is none.

    Raises:
        ValueError: the device refused all of them.
    """
    timed = [(c.median_s, c) for c in measured if c.median_s is not None]
    if not timed:
        raise ValueError(f"no candidate compiles: {measured[0].refusal}")
    best_s, best = min(timed)
    first_s, first = timed[0]
    return best if best_s < (1 - TIE) * first_s else first


def write(file: Path, kind: str, num_tokens: int, best: Candidate) -> None:
    """Put an entry into a file of block sizes, in place of one for the same kind and length."""
    entries = {k: [[tokens, *blocks] for tokens, blocks in v] for k, v in read(file).items()}
    kept = [entry for entry in entries.get(kind, []) if entry[0] != num_tokens]
    entries[kind] = sorted([*kept, [num_tokens, *best.blocks]])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    read.cache_clear()


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="lengths of rows (default: 8192)")
    parser.add_argument("--out", type=Path, default=USER_FILE, help="file to write; attention reads %(default)s")
    parser.add_argument("--timings", type=int, default=NUM_TIMINGS, help="timings each (default: %(default)s)")
    options = parser.parse_args(arguments)
    here = target()
    shapes = SMALL if here.backend == "cpu" else QWEN3_8B
    try:
        if min(*options.tokens, options.timings) < 1:
            raise ValueError("--tokens and --timings must be at least 1")
        for num_tokens in options.tokens:
            all_compiled = [compiled(num_tokens, shapes, blocks) for blocks in candidates(here, num_tokens)]
            measured = []
            for candidate in timed(num_tokens, shapes, options.timings, pruned(all_compiled)):
                measured.append(candidate)
                told = candidate.refusal or f"{1e3 * (candidate.median_s or 0):,.3g} ms"
                print(f"{num_tokens:>8,} tokens, {_told(candidate.blocks):<22}  {told}", flush=True)
            best = fastest(measured)
            write(options.out, here.kind, num_tokens, best)
            print(f"{here.kind}, {num_tokens:,} tokens: {_told(best.blocks)}, written to {options.out}")
    except ValueError as error:
        print(f"kernels.tune: error: {error}")
        return 2
    return 0


def _told(blocks: Blocks) -> str:
    return f"{blocks.q:>4} x {blocks.k:<4} {blocks.stages} stages"


if __name__ == "__main__":
    raise SystemExit(main())
