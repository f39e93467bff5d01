"""Every policy gives the same gradient, and keeps what it says; read off the program that jax traces."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jorch.model.remat import check_host_memory
from jorch.model.transformer import Qwen3

POLICIES = ("full", "save_attention", "offload")
LAYERS, D, F, N, H = 2, 16, 24, 4, 8


def loss_fn(model, num_tokens):
    token_ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, num_tokens)))
    positions, mask = jnp.arange(num_tokens)[None], jnp.full((1, num_tokens), num_tokens)

    def loss(params):
        return jnp.sum(model.bind(params).hidden(token_ids, positions, mask) ** 2)

    return loss


@functools.cache
def gradient_of(model_config, num_tokens):
    return jax.jit(jax.grad(loss_fn(Qwen3(model_config), num_tokens)))


@pytest.mark.parametrize(
    ("remat", "num_tokens"),
    [
        ("save_attention", 20),
        *(pytest.param(remat, 300, marks=pytest.mark.slow) for remat in POLICIES),
    ],
)
def test_the_gradient_is_that_of_keeping_everything(remat, num_tokens, tiny, tiny_config):
    """For rows that attend densely and for rows that attend by tiles."""
    _, params = tiny
    gradient, expected = (gradient_of(tiny_config(remat=r), num_tokens)(params) for r in (remat, "none"))
    # The same operations, which XLA may fuse differently.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), gradient, expected)


def kept_by(model, num_tokens):
    """Shapes of what all layers keep for the backward pass, without the layers' axis; parameters are not meant."""
    params = model.abstract_params()
    backward = jax.eval_shape(lambda params: jax.vjp(loss_fn(model, num_tokens), params)[1], params)
    shapes = (x.shape for x in jax.tree.leaves(backward))
    return sorted(shape[1:] for shape in shapes if shape[:3] == (LAYERS, 1, num_tokens))


@pytest.mark.parametrize("num_tokens", [pytest.param(20, marks=pytest.mark.slow), 300])
def test_what_each_policy_keeps(num_tokens, tiny_config):
    """Inputs of the layers; outputs of attention, with the log-sum-exps that tiles need beside them; nothing else."""
    T = num_tokens
    kept = {remat: kept_by(Qwen3(tiny_config(remat=remat)), T) for remat in ("none", *POLICIES)}
    assert kept["full"] == kept["offload"] == [(1, T, D)]
    of_attention = [(1, T, N), (1, T, N, H)] if T > 256 else [(1, T, N, H)]
    assert kept["save_attention"] == sorted([(1, T, D), *of_attention])
    assert len(kept["none"]) > 10
    assert (1, T, F) in kept["none"]


def test_saved_attention_is_not_computed_again(tiny_config):
    """Loops over tiles in the gradient's program: one forward and one backward, and with `full` another forward."""
    params = Qwen3(tiny_config()).abstract_params()
    loops = {
        remat: str(jax.make_jaxpr(jax.grad(loss_fn(Qwen3(tiny_config(remat=remat)), 300)))(params)).count("while[")
        for remat in ("full", "save_attention")
    }
    assert loops == {"full": 3, "save_attention": 2}


def test_offloaded_inputs_lie_in_the_hosts_memory(tiny_config):
    """What the forward scan hands on is host memory under `offload` only."""
    params = Qwen3(tiny_config()).abstract_params()
    for remat, held in (("full", 0), ("offload", 1)):
        model = Qwen3(tiny_config(remat=remat))
        program = str(jax.make_jaxpr(jax.grad(loss_fn(model, 20)))(params))
        assert min(program.count(f"f32<host>[{LAYERS},1,20,{D}]"), 1) == held


def test_a_device_that_cannot_reach_the_host_is_refused():
    memory = SimpleNamespace(kind="device")
    device = SimpleNamespace(device_kind="Abacus", addressable_memories=lambda: [memory])
    with pytest.raises(ValueError, match=r"remat=offload needs memory of kind pinned_host, and Abacus has device; set"):
        check_host_memory(device)
    check_host_memory(jax.devices()[0])
