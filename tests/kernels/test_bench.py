"""The benchmark measures what it says: right paths only, operations counted from visible pairs."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import bench, rivals
from kernels.attention.api import attention
from kernels.bench import LeftOut, Timing, _error, _normal, measure
from kernels.rivals import Path
from kernels.shapes import MASKS, Shapes
from tests.kernels.devices import V5E, interpreted
from tests.kernels.oracle import sees

TINY = Shapes(attention_tokens=(64,), N=2, K=1, H=8, logprob_tokens=16, D=8, V=32, dtype="float32")


@pytest.fixture(scope="module")
def timings():
    return [t for t in measure(TINY, num_timings=3, cases=["packed", "logprob"]) if isinstance(t, Timing)]


@pytest.mark.slow
def test_every_pass_of_every_path_is_timed(timings):
    for kernel, path in (("attention", "xla_chunked"), ("attention", "jax.nn, dense mask"), ("logprob", "xla_chunked")):
        lines = [t.line for t in timings if (t.line.kernel, t.line.path) == (kernel, path)]
        case = "packed" if kernel == "attention" else "V=32"
        assert [(x.case, x.direction) for x in lines] == [(case, d) for d in ("forward", "backward", "both")]
    for t in timings:
        assert 0 < t.q25_s <= t.median_s <= t.q75_s
        assert t.line.error < 1e-5
        assert t.peak_bytes > t.scratch_bytes


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
        both = bench.our_paths("packed", 384, shapes) | bench._rivals("packed", 384, shapes)
        paths = {name: path.function for name, path in both.items() if isinstance(path, Path)}
        drawn = [_normal((1, 384, n, 128), "float32", n) for n in (2, 1, 1, 2)]
        errors = {name: _error(paths["xla_chunked"], function, *drawn) for name, function in paths.items()}
    assert errors.keys() == {"xla_chunked", "pallas_tpu", "jax's splash", "jax.nn, dense mask"}


def test_others_that_fail_or_are_wrong_are_left_out_with_the_reason(monkeypatch):
    def fails(q, k, v):
        raise NotImplementedError("not on this device\nmore")

    def wrong(q, k, v):
        return 2 * q

    found = {"fails": Path(fails, "float32"), "wrong": Path(wrong, "float32", ("forward",)), "absent": "no such device"}
    monkeypatch.setattr(bench, "rivals", lambda *_: found)
    monkeypatch.setattr(bench, "our_paths", lambda *_: {})
    lines = list(bench._attention("packed", 64, TINY, 1))
    assert [(x.path, type(x)) for x in lines] == [(name, LeftOut) for name in found]
    for line, reason in zip(lines, ("not on this device", "a path is off by", "no such device"), strict=True):
        assert line.reason.startswith(reason)
        assert "\n" not in line.reason
    monkeypatch.setattr(bench, "our_paths", lambda *_: {"ours": Path(wrong, "float32", ("forward",))})
    with pytest.raises(AssertionError, match="a path is off by"):
        list(bench._attention("packed", 64, TINY, 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", MASKS)
def test_tokamax_is_given_the_same_mask(case):
    """Its plain implementation, as its kernels need a GPU; which form of a mask they are given is what is tested."""
    pytest.importorskip("tokamax", reason="tokamax is missing: extra tokamax, Python 3.12")
    end = jnp.asarray(MASKS[case](100))
    path = rivals.tokamax_path("xla", case, end, TINY)
    exact = partial(attention, mask=end[None], scale=TINY.H**-0.5, implementation="reference")
    assert _error(exact, path.function, *(_normal((1, 100, n, 8), "float32", n) for n in (2, 1, 1, 2))) < 1e-5


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
    shared = MASKS["shared-prompt"](num_tokens)
    prompt = num_tokens // 10 * 2
    assert (shared[:prompt] == num_tokens).all()
    assert len(set(shared[prompt:])) == 8
    assert (shared > np.arange(num_tokens)).all()
