"""Before `auto` takes a kernel it is tried on the device at hand; one that is wrong or fails is passed over, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import api, choice, trial, xla_chunked
from kernels.attention.api import attention, why


class Kernel:
    """The portable path with a planted fault, in place of a kernel whose device is not here."""

    def __init__(self, planted=None):
        self.planted, self.num_forwards = planted, 0

    def forward(self, *arguments):
        self.num_forwards += 1
        if self.planted == "raises":
            raise NotImplementedError("no such instruction\nand more")
        o, lse = xla_chunked.forward(*arguments)
        return (o * jnp.nan if self.planted == "gives NaN" else o), lse

    def backward(self, *arguments):
        dq, dk, dv = xla_chunked.backward(*arguments)
        return dq, (dk / 2 if self.planted == "halves dk" else dk), dv


@pytest.fixture
def offered(monkeypatch):
    """Lets `auto` believe that a kernel serves this device."""

    def offer(kernel):
        monkeypatch.setitem(choice._FAST, "cpu", [("pallas_tpu", "it is offered")])
        monkeypatch.setitem(choice._TRIED, "pallas_tpu", kernel)
        monkeypatch.setitem(api.BY_TILES, "pallas_tpu", kernel)
        monkeypatch.setattr(choice, "refusal", lambda path, request: None)
        return kernel

    return offer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_path_that_is_right_has_no_fault(dtype):
    for form in (trial.Form(64, 32), trial.Form(64, 32, window=True), trial.Form(32, 64, window=True, placed=True)):
        assert trial.fault(xla_chunked, 16, dtype, 5.0, form) is None


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ("halves dk", "it is off by 5.0e-01 here, more than 1e-05"),
        ("raises", "it fails here: no such instruction"),
        pytest.param("gives NaN", "it is off by inf here, more than 1e-05", marks=pytest.mark.slow),
    ],
)
def test_auto_passes_over_what_is_wrong_and_says_so(offered, planted, told):
    offered(Kernel(planted))
    q = jax.ShapeDtypeStruct((1, 300, 2, 16), jnp.float32)
    assert why(q, mask="causal") == f"xla_chunked: it skips invisible tiles on any device; not pallas_tpu: {told}"


@pytest.mark.slow
def test_the_trial_runs_while_its_caller_is_traced_and_only_once(offered):
    kernel = offered(Kernel())
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300, 2, 16)), jnp.float32)

    def loss(q, implementation):
        return jnp.sum(jnp.sin(attention(q, q, q, mask="causal", scale=0.3, implementation=implementation)))

    got = jax.jit(jax.grad(lambda q: jax.lax.map(lambda q: loss(q, "auto"), jnp.stack([q, 2 * q])).sum()))(q)
    wanted = jax.grad(lambda q: loss(q, "xla_chunked") + loss(2 * q, "xla_chunked"))(q)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    traced = kernel.num_forwards
    assert why(q, mask="causal") == "pallas_tpu: it is offered"
    assert kernel.num_forwards == traced


def test_no_trial_for_a_device_that_is_not_here(offered, monkeypatch):
    kernel = offered(Kernel("raises"))
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"device_kind": "another"})])
    assert why(jax.ShapeDtypeStruct((1, 300, 2, 16), jnp.float32), mask="causal") == "pallas_tpu: it is offered"
    assert kernel.num_forwards == 0
