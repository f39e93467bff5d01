"""Timings of the kernels beside what jax itself offers; each path is checked before it is timed.

Rates count the floating-point operations of the visible pairs; the dense-equivalent rate counts those of a causal row
of the same length, so that it rises where work is skipped. What a backward pass computes again counts nowhere.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.api import attention, serves
from kernels.attention.mask import num_visible_pairs
from kernels.attention.reference import visible
from kernels.attention.tiles import tile
from kernels.compat import target
from kernels.logprob.api import linear_logprob
from kernels.logprob.reference import log_probabilities
from kernels.shapes import MASKS, QWEN3_8B, SMALL, Shapes

Function = Callable[..., jax.Array]

NUM_TIMINGS = 20
CHECKED_TOKENS = 1024
"""Checks compare with dense float32 arithmetic, for which longer rows have no memory."""

DENSE_BYTES = 64e9
"""Paths that hold everything at once are left out where they would need more."""

MOST_ERROR = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative L2 distance from float32 arithmetic that roundings of the dtype explain."""


class Line(NamedTuple):
    """What is measured."""

    kernel: str  # "attention" or "logprob"
    case: str
    path: str
    num_tokens: int
    direction: str  # "forward", "backward" or "both"
    error: float  # relative L2 distance of outputs and gradients from the reference, the largest


class Timing(NamedTuple):
    """One line with its numbers: seconds, floating-point operations a second, bytes."""

    line: Line
    median_s: float
    q25_s: float
    q75_s: float
    visible_flops_s: float
    dense_flops_s: float
    scratch_bytes: int  # beside inputs and outputs, as XLA planned it


def shapes_here() -> Shapes:
    """Qwen3-8B's shapes where jax has an accelerator, small ones on a CPU."""
    return SMALL if jax.default_backend() == "cpu" else QWEN3_8B


def measure(shapes: Shapes, num_timings: int = NUM_TIMINGS, cases: Sequence[str] = tuple(MASKS)) -> Iterator[Timing]:
    """Check and time everything, line by line; attention under the masks of `cases`.

    Raises:
        AssertionError: a path that computes something else than the reference.
    """
    for num_tokens in shapes.attention_tokens:
        for case in cases:
            yield from _attention(case, num_tokens, shapes, num_timings)
    yield from _logprob(shapes, num_timings)


def _attention(case: str, num_tokens: int, shapes: Shapes, num_timings: int) -> Iterator[Timing]:
    def draw(num_tokens: int) -> list[jax.Array]:
        heads = (shapes.N, shapes.K, shapes.K, shapes.N)
        return [_normal((1, num_tokens, n, shapes.H), shapes.dtype, seed) for seed, n in enumerate(heads)]

    checked = min(num_tokens, CHECKED_TOKENS)
    end = jnp.asarray(MASKS[case](checked)[None])
    exact = partial(attention, mask=end, scale=shapes.H**-0.5, implementation="reference")
    errors = {
        path: _error(exact, function, *draw(checked))
        for path, function in _attention_paths(case, checked, shapes).items()
    }
    pairs, dense_pairs = num_visible_pairs(MASKS[case](num_tokens)[None]), num_tokens * (num_tokens + 1) // 2
    forward_flops = 4 * shapes.N * shapes.H
    for path, function in _attention_paths(case, num_tokens, shapes).items():
        for direction, measured in _by_direction(function, *draw(num_tokens), num_timings=num_timings):
            # Two products forward, five backward.
            flops = forward_flops * {"forward": 1, "backward": 2.5, "both": 3.5}[direction]
            line = Line("attention", case, path, num_tokens, direction, errors[path])
            yield _timing(line, measured, flops * pairs, flops * dense_pairs)


def _attention_paths(case: str, num_tokens: int, shapes: Shapes) -> dict[str, Function]:
    """Functions (q, k, v) -> o by the name that the table shows: ours and jax.nn's."""
    end = jnp.asarray(MASKS[case](num_tokens)[None])
    scale = shapes.H**-0.5
    tiled = jax.jit(tile)(end)
    mask: Any = "causal" if case == "causal" else end

    def ours(implementation: Any, mask: Any) -> Function:
        return lambda q, k, v: attention(q, k, v, mask=mask, scale=scale, implementation=implementation)

    q = jax.ShapeDtypeStruct((1, num_tokens, shapes.N, shapes.H), shapes.dtype)
    given: dict[Any, Any] = dict.fromkeys(("xla_chunked", "pallas_mosaic_gpu", "pallas_tpu"), tiled) | {"cudnn": mask}
    paths = {}
    for path, mask in given.items():
        if serves(path, q, mask):
            paths[path] = ours(path, mask)
    if target().backend == "tpu" and case in ("causal", "packed"):
        paths["jax's splash"] = splash(num_tokens, shapes, end[0])
    if 8 * shapes.N * num_tokens**2 < DENSE_BYTES:
        seen = jax.jit(visible)(end)[:, None]
        paths["jax.nn, dense mask"] = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale)
    return paths


def splash(num_tokens: int, shapes: Shapes, segment_ids_T: jax.Array) -> Function:
    """jax's own kernel for TPUs: it skips what causality hides, and masks other segments without skipping them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.CausalMask((num_tokens, num_tokens))
    heads = splash_attention_mask.MultiHeadMask([mask] * shapes.N)
    block = min(512, num_tokens)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, block))
    kernel: Any = splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    segments = splash_attention_kernel.SegmentIds(segment_ids_T, segment_ids_T)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x[0].swapaxes(0, 1) for x in (q * shapes.H**-0.5, k, v))
        return kernel(q, k, v, segment_ids=segments).swapaxes(0, 1)[None]

    return attend


def _logprob(shapes: Shapes, num_timings: int) -> Iterator[Timing]:
    D, V = shapes.D, shapes.V

    def paths(num_tokens: int) -> dict[str, Function]:
        targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, num_tokens), np.int32))
        found: dict[str, Function] = {"xla_chunked": lambda h, w: linear_logprob(h, w, targets)[0]}
        if 12 * num_tokens * V < DENSE_BYTES:
            found["reference"] = lambda h, w: log_probabilities(h, w, targets)[0]
        return found

    def draw(num_tokens: int) -> list[jax.Array]:
        hidden, unembedding = _normal((1, num_tokens, D), shapes.dtype, 0), _normal((V, D), shapes.dtype, 1, D**-0.5)
        return [hidden, unembedding, _normal((1, num_tokens), "float32", 2)]

    checked = min(shapes.logprob_tokens, CHECKED_TOKENS)
    exact = paths(checked)["reference"]
    errors = {path: _error(exact, function, *draw(checked)) for path, function in paths(checked).items()}
    for path, function in paths(shapes.logprob_tokens).items():
        drawn = draw(shapes.logprob_tokens)
        for direction, measured in _by_direction(function, *drawn, num_timings=num_timings):
            flops = 2 * shapes.logprob_tokens * D * V * {"forward": 1, "backward": 2, "both": 3}[direction]
            line = Line("logprob", f"V={V:,}", path, shapes.logprob_tokens, direction, errors[path])
            yield _timing(line, measured, flops, flops)


def _error(exact: Function, function: Function, *inputs_and_cotangent: jax.Array) -> float:
    """The largest relative L2 distance of outputs and gradients from `exact` in float32."""
    *inputs, cotangent = inputs_and_cotangent
    wanted = _both(exact)(*(x.astype(jnp.float32) for x in inputs), cotangent=cotangent.astype(jnp.float32))
    got = _both(function)(*inputs, cotangent=cotangent)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    distances = [_distance(np.asarray(x, np.float32), np.asarray(y)) for x, y in pairs]
    most = MOST_ERROR[str(inputs[0].dtype)]
    assert max(distances) < most, f"a path is off by {max(distances):.1e}, more than {most}"
    return max(distances)


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _both(function: Function) -> Callable[..., tuple[jax.Array, tuple]]:
    """Jitted (*inputs, cotangent) -> (output, gradients)."""

    @jax.jit
    def run(*inputs: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(function, *inputs)
        return output, pull(cotangent)

    return run


def _by_direction(
    function: Function, *inputs_and_cotangent: jax.Array, num_timings: int
) -> Iterator[tuple[str, tuple[np.ndarray, int]]]:
    """(direction, (seconds of each call, bytes of scratch))"""
    *inputs, cotangent = inputs_and_cotangent
    yield "forward", _time(jax.jit(function), *inputs, num_timings=num_timings)
    _, pull = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
    yield "backward", _time(jax.jit(lambda pull, c: pull(c)), pull, cotangent, num_timings=num_timings)
    del pull
    both = _both(function)
    yield "both", _time(jax.jit(lambda c, *x: both(*x, cotangent=c)), cotangent, *inputs, num_timings=num_timings)


def _time(jitted: Any, *arguments: Any, num_timings: int) -> tuple[np.ndarray, int]:
    program = jitted.lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(num_timings):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return np.array(seconds), program.memory_analysis().temp_size_in_bytes


def _timing(line: Line, measured: tuple[np.ndarray, int], flops: float, dense_flops: float) -> Timing:
    seconds, scratch_bytes = measured
    q25_s, median_s, q75_s = map(float, np.percentile(seconds, (25, 50, 75)))
    return Timing(line, median_s, q25_s, q75_s, flops / median_s, dense_flops / median_s, scratch_bytes)


def _normal(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> jax.Array:
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(scale * drawn, dtype)
