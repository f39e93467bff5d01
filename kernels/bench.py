"""Timings of the kernels beside what others offer; each path is checked before it is timed.

Ours must be right; another's that is wrong, fails or does not serve a case is left out, with the reason.

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

from kernels.attention.api import attention, why_not
from kernels.attention.mask import num_visible_pairs
from kernels.attention.tiles import tile
from kernels.attention.trial import MOST_ERROR, distance
from kernels.logprob.api import linear_logprob
from kernels.logprob.reference import log_probabilities
from kernels.rivals import DENSE_BYTES, DIRECTIONS, Function, Path, rivals
from kernels.shapes import MASKS, QWEN3_8B, SMALL, Shapes

NUM_TIMINGS = 20
CHECKED_TOKENS = 1024
"""Checks compare with dense float32 arithmetic, for which longer rows have no memory."""


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
    peak_bytes: int  # with them


class LeftOut(NamedTuple):
    """A path that was not timed."""

    kernel: str
    case: str
    path: str
    num_tokens: int
    reason: str


def shapes_here() -> Shapes:
    """Qwen3-8B's shapes where jax has an accelerator, small ones on a CPU."""
    return SMALL if jax.default_backend() == "cpu" else QWEN3_8B


LOGPROB = "logprob"
CASES = (*MASKS, LOGPROB)
"""Attention under each of the masks, and log-probabilities."""


def measure(shapes: Shapes, num_timings: int = NUM_TIMINGS, cases: Sequence[str] = CASES) -> Iterator[Timing | LeftOut]:
    """Check and time the `cases`, line by line.

    Raises:
        AssertionError: a path of ours that computes something else than the reference.
    """
    for num_tokens in shapes.attention_tokens:
        for case in MASKS:
            if case in cases:
                yield from _attention(case, num_tokens, shapes, num_timings)
    if LOGPROB in cases:
        yield from _logprob(shapes, num_timings)


def _attention(case: str, num_tokens: int, shapes: Shapes, num_timings: int) -> Iterator[Timing | LeftOut]:
    ours, others = (make(case, num_tokens, shapes) for make in (our_paths, _rivals))
    for name, path in {**ours, **others}.items():
        reason = path if isinstance(path, str) else None
        if not isinstance(path, str):
            try:
                yield from _attention_timings(name, path, case, num_tokens, shapes, num_timings)
            except Exception as error:  # another library's code on this device: whatever it raises
                if name in ours:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason is not None:
            yield LeftOut("attention", case, name, num_tokens, reason)


def _attention_timings(
    name: str, path: Path, case: str, num_tokens: int, shapes: Shapes, num_timings: int
) -> list[Timing]:
    def draw(num_tokens: int) -> list[jax.Array]:
        heads = (shapes.N, shapes.K, shapes.K, shapes.N)
        return [_normal((1, num_tokens, n, shapes.H), path.dtype, seed) for seed, n in enumerate(heads)]

    checked = min(num_tokens, CHECKED_TOKENS)
    short = {**our_paths(case, checked, shapes), **_rivals(case, checked, shapes)}[name]
    assert not isinstance(short, str), short
    end = jnp.asarray(MASKS[case](checked)[None])
    exact = partial(attention, mask=end, scale=shapes.H**-0.5, implementation="reference")
    error = _error(exact, short.function, *draw(checked), gradients="backward" in path.directions)
    pairs, dense_pairs = num_visible_pairs(MASKS[case](num_tokens)[None]), num_tokens * (num_tokens + 1) // 2
    timings = []
    for direction, measured in _by_direction(path.function, path.directions, *draw(num_tokens), num=num_timings):
        # Two products forward, five backward.
        flops = 4 * shapes.N * shapes.H * {"forward": 1, "backward": 2.5, "both": 3.5}[direction]
        line = Line("attention", case, name, num_tokens, direction, error)
        timings.append(_timing(line, measured, flops * pairs, flops * dense_pairs))
    return timings


def our_paths(case: str, num_tokens: int, shapes: Shapes) -> dict[str, Path | str]:
    """Our implementations by name, or why one does not serve this case here."""
    end = jnp.asarray(MASKS[case](num_tokens)[None])
    tiled = jax.jit(tile)(end)
    given: dict[Any, Any] = dict.fromkeys(("xla_chunked", "pallas_mosaic_gpu", "pallas_tpu"), tiled)
    given["cudnn"] = "causal" if case == "causal" else end
    q = jax.ShapeDtypeStruct((1, num_tokens, shapes.N, shapes.H), shapes.dtype)

    def of(implementation: Any, mask: Any) -> Path | str:
        function = partial(attention, mask=mask, scale=shapes.H**-0.5, implementation=implementation)
        return why_not(implementation, q, mask) or Path(function, shapes.dtype)

    return {implementation: of(implementation, mask) for implementation, mask in given.items()}


def _rivals(case: str, num_tokens: int, shapes: Shapes) -> dict[str, Path | str]:
    return rivals(case, jnp.asarray(MASKS[case](num_tokens)), shapes)


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
        for direction, measured in _by_direction(function, DIRECTIONS, *drawn, num=num_timings):
            flops = 2 * shapes.logprob_tokens * D * V * {"forward": 1, "backward": 2, "both": 3}[direction]
            line = Line(LOGPROB, f"V={V:,}", path, shapes.logprob_tokens, direction, errors[path])
            yield _timing(line, measured, flops, flops)


def _error(exact: Function, function: Function, *inputs_and_cotangent: jax.Array, gradients: bool = True) -> float:
    """The largest relative L2 distance of outputs and gradients from `exact` in float32."""
    *inputs, cotangent = inputs_and_cotangent
    exact_inputs = [x.astype(jnp.float32) for x in inputs]
    if gradients:
        wanted: Any = _both(exact)(*exact_inputs, cotangent=cotangent.astype(jnp.float32))
        got: Any = _both(function)(*inputs, cotangent=cotangent)
    else:
        wanted, got = jax.jit(exact)(*exact_inputs), jax.jit(function)(*inputs)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    distances = [distance(x, y) for x, y in pairs]
    most = MOST_ERROR[str(inputs[0].dtype)]
    assert max(distances) < most, f"a path is off by {max(distances):.1e}, more than {most}"
    return max(distances)


def _both(function: Function) -> Callable[..., tuple[jax.Array, tuple]]:
    """Jitted (*inputs, cotangent) -> (output, gradients)."""

    @jax.jit
    def run(*inputs: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, tuple]:
        output, pull = jax.vjp(function, *inputs)
        return output, pull(cotangent)

    return run


class _Measured(NamedTuple):
    """Seconds of each call, and the bytes that XLA planned."""

    seconds: np.ndarray
    scratch_bytes: int
    peak_bytes: int


def _by_direction(
    function: Function, directions: Sequence[str], *inputs_and_cotangent: jax.Array, num: int
) -> Iterator[tuple[str, _Measured]]:
    *inputs, cotangent = inputs_and_cotangent
    yield "forward", _time(jax.jit(function), *inputs, num_timings=num)
    if "backward" not in directions:
        return
    _, pull = jax.jit(lambda *x: jax.vjp(function, *x))(*inputs)
    yield "backward", _time(jax.jit(lambda pull, c: pull(c)), pull, cotangent, num_timings=num)
    del pull
    both = _both(function)
    yield "both", _time(jax.jit(lambda c, *x: both(*x, cotangent=c)), cotangent, *inputs, num_timings=num)


def _time(jitted: Any, *arguments: Any, num_timings: int) -> _Measured:
    program = jitted.lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(num_timings):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    memory = program.memory_analysis()
    scratch_bytes = memory.temp_size_in_bytes
    return _Measured(
        np.array(seconds), scratch_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes + scratch_bytes
    )


def _timing(line: Line, measured: _Measured, flops: float, dense_flops: float) -> Timing:
    q25_s, median_s, q75_s = map(float, np.percentile(measured.seconds, (25, 50, 75)))
    rates = (flops / median_s, dense_flops / median_s)
    return Timing(line, median_s, q25_s, q75_s, *rates, measured.scratch_bytes, measured.peak_bytes)


def _normal(shape: tuple[int, ...], dtype: str, seed: int, scale: float = 1.0) -> jax.Array:
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(scale * drawn, dtype)
