"""The benchmark measures what it says: right paths only, operations counted from visible pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bench import _attention_paths, _error, _normal, measure
from kernels.shapes import MASKS, Shapes
from tests.kernels.devices import V5E, interpreted
from tests.kernels.oracle import sees

TINY = Shapes(attention_tokens=(64,), N=2, K=1, H=8, logprob_tokens=16, D=8, V=32, dtype="float32")


@pytest.fixture(scope="module")
def timings():
    return list(measure(TINY, num_timings=3, cases=["packed"]))


@pytest.mark.slow
def test_every_pass_of_every_path_is_timed(timings):
    for kernel, path in (("attention", "xla_chunked"), ("attention", "jax.nn, dense mask"), ("logprob", "xla_chunked")):
        lines = [t.line for t in timings if (t.line.kernel, t.line.path) == (kernel, path)]
        case = "packed" if kernel == "attention" else "V=32"
        assert [(x.case, x.direction) for x in lines] == [(case, d) for d in ("forward", "backward", "both")]
    for t in timings:
        assert 0 < t.q25_s <= t.median_s <= t.q75_s
        assert t.line.error < 1e-5


@pytest.mark.slow
def test_operations_are_those_of_visible_pairs(timings):
    factors = {"forward": 1, "backward": 2.5, "both": 3.5}
    for t in timings:
        if t.line.kernel == "attention":
            pairs = sees(MASKS[t.line.case](64)).sum()
            assert t.visible_flops_s * t.median_s == pytest.approx(factors[t.line.direction] * 4 * pairs * 2 * 8)
            assert t.dense_flops_s * t.median_s == pytest.approx(factors[t.line.direction] * 4 * (64 * 65 / 2) * 2 * 8)
        elif t.line.direction == "both":
            assert t.visible_flops_s * t.median_s == pytest.approx(3 * 2 * 16 * 8 * 32)


@pytest.mark.slow
def test_a_tpu_measures_its_kernels_beside_jaxs_own():
    """Interpreted: every path gives the reference's outputs and gradients, or the benchmark would stop."""
    shapes = Shapes((384,), N=2, K=1, H=128, logprob_tokens=16, D=8, V=32, dtype="float32")
    with interpreted(V5E):
        paths = _attention_paths("packed", 384, shapes)
        drawn = [_normal((1, 384, n, 128), "float32", n) for n in (2, 1, 1, 2)]
        errors = {path: _error(paths["xla_chunked"], function, *drawn) for path, function in paths.items()}
    assert errors.keys() == {"xla_chunked", "pallas_tpu", "jax's splash", "jax.nn, dense mask"}


def test_a_path_that_computes_something_else_is_not_timed():
    x, cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), jnp.float32)
    assert _error(jnp.sin, lambda x: 2 * jnp.sin(x / 2) * jnp.cos(x / 2), x, cotangent) < 1e-6
    with pytest.raises(AssertionError, match="a path is off by"):
        _error(jnp.sin, lambda x: 1.001 * jnp.sin(x), x, cotangent)


@pytest.mark.parametrize("num_tokens", [64, 100, 1000])
def test_masks_fill_the_row_and_say_what_they_are(num_tokens):
    assert (MASKS["causal"](num_tokens) == num_tokens).all()
    packed = MASKS["packed"](num_tokens)
    assert len(set(packed)) == 6
    assert packed[-1] == num_tokens
    shared = MASKS["shared prompt"](num_tokens)
    prompt = num_tokens // 10 * 2
    assert (shared[:prompt] == num_tokens).all()
    assert len(set(shared[prompt:])) == 8
    assert (shared > np.arange(num_tokens)).all()
