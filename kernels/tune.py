"""`python -m kernels.tune`: which block sizes of tiled attention are fastest here, written where attention looks.

Lists the candidates, drops those that the device's compiler refuses, times forward and backward of the rest on packed
rows, and keeps the fastest. The Hopper kernels have one tile size and so one candidate.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.api import attention
from kernels.attention.tiles import tile
from kernels.compat import Target, target
from kernels.shapes import QWEN3_8B, SMALL, Shapes, packed
from kernels.tuning import USER_FILE, read, rule_of_thumb

NUM_TIMINGS = 20
TIE = 0.02
"""A candidate must beat the rule of thumb by this share of its time; otherwise the rule stays."""


class Candidate(NamedTuple):
    """One pair of block sizes with what became of it."""

    block_q: int
    block_k: int
    median_s: float | None
    refusal: str | None


def candidates(here: Target, num_tokens: int) -> list[tuple[int, int]]:
    """Block sizes to try, the rule of thumb first; a Hopper kernel's tiles are of one size."""
    first = rule_of_thumb(here, num_tokens)
    if here.backend == "gpu":
        return [first]
    sizes = [n for n in (128, 256, 512, 1024, 2048) if n <= num_tokens]
    others = [(q, k) for q in sizes for k in sizes if (q, k) != first and max(q, k) <= 8 * min(q, k)]
    return [first, *others]


def measure(num_tokens: int, shapes: Shapes, num_timings: int, pairs: list[tuple[int, int]]) -> Iterator[Candidate]:
    """Compile, check the memory of, and time each pair of block sizes."""
    rng = np.random.default_rng(0)
    heads = (shapes.N, shapes.K, shapes.K)
    q, k, v = (jnp.asarray(rng.standard_normal((1, num_tokens, n, shapes.H)), shapes.dtype) for n in heads)
    end = jnp.asarray(packed(num_tokens)[None])
    for block_q, block_k in pairs:
        try:
            program = jax.jit(_gradient(block_q, block_k, shapes.H)).lower(q, k, v, end).compile()
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            yield Candidate(block_q, block_k, None, str(error).splitlines()[0])
            continue
        jax.block_until_ready(program(q, k, v, end))
        seconds = []
        for _ in range(num_timings):
            began = time.perf_counter()
            jax.block_until_ready(program(q, k, v, end))
            seconds.append(time.perf_counter() - began)
        yield Candidate(block_q, block_k, float(np.median(seconds)), None)


def _gradient(block_q: int, block_k: int, H: int) -> Callable[..., Any]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
        mask = tile(end, block_q=block_q, block_k=block_k)
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
    entries = {k: [list(entry) for entry in v] for k, v in read(file).items()}
    kept = [entry for entry in entries.get(kind, []) if entry[0] != num_tokens]
    entries[kind] = sorted([*kept, [num_tokens, best.block_q, best.block_k]])
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
            measured = []
            for candidate in measure(num_tokens, shapes, options.timings, candidates(here, num_tokens)):
                measured.append(candidate)
                told = candidate.refusal or f"{1e3 * (candidate.median_s or 0):,.3g} ms"
                print(f"{num_tokens:>8,} tokens, {candidate.block_q:>4} x {candidate.block_k:<4}  {told}", flush=True)
            best = fastest(measured)
            write(options.out, here.kind, num_tokens, best)
            print(f"{here.kind}, {num_tokens:,} tokens: {best.block_q} x {best.block_k}, written to {options.out}")
    except ValueError as error:
        print(f"kernels.tune: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
