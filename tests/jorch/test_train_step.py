"""One train step: its gradient is the plain one, however the batch was split, ordered or laid over devices."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jorch.data.packing import pack
from jorch.model.transformer import Qwen3
from jorch.plan.job import PUBLISHED
from jorch.sections import OptimizerConfig
from jorch.sharding import MESH_AXES, shard_batch
from jorch.train.optimizer import make_optimizer, make_schedule
from jorch.train.sft import cross_entropy
from jorch.train.state import abstract_state, init_state, state_shardings
from jorch.train.step import make_train_step
from jorch.types import Sample

LENGTH, ROW_TOKENS = 12, 16


def make_samples(count=6, seed=0):
    """Pairs of siblings, masked middles, two of them counted several times."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        if i % 2 == 0:
            prompt = rng.integers(0, 64, rng.integers(3, 6))
        length = int(rng.integers(len(prompt) + 3, LENGTH + 1))
        token_ids = np.concatenate([prompt, rng.integers(0, 64, length - len(prompt))]).astype(np.int32)
        mask = np.arange(length) >= len(prompt)
        mask[len(prompt) + 1] = False
        samples.append(
            Sample(token_ids, mask, np.zeros(length, np.float32), 1.0, num_copies=1 + (i == 1) + 3 * (i == 4))
        )
    return samples


@functools.cache
def sgd_step(model, mesh):
    """A step whose update is minus the gradient."""
    return make_train_step(model, optax.sgd(1.0), cross_entropy, mesh)


def gradient_of(model, params, mesh, batch):
    """(gradient, metrics) of one SFT step."""
    state = init_state(model, optax.sgd(1.0), mesh, params)
    state, metrics = sgd_step(model, mesh)(state, shard_batch(mesh, batch), 1.0)
    gradient = jax.tree.map(lambda new, old: np.asarray(old, np.float64) - np.asarray(new), state.params, params)
    return gradient, {name: float(value) for name, value in metrics.items()}


def packed(samples, micro_rows, num_micro):
    return pack(samples, row_tokens=ROW_TOKENS, micro_rows=micro_rows, num_micro=num_micro)


def assert_close(tree, expected, tolerance):
    """Within `tolerance` of the largest entry: gradients cancel, so that small entries have no digits of their own."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale), tree, expected)


def plain_loss(qwen3_logits, config, samples):
    """Mean negative log-probability, one sequence at a time, as a function of the parameters in float64."""
    token_ids = np.stack([np.pad(s.token_ids, (0, LENGTH - len(s.token_ids))) for s in samples])
    weights = np.stack([np.pad(s.loss_mask * float(s.num_copies), (0, LENGTH - len(s.loss_mask))) for s in samples])

    def loss(params):
        def summed(token_ids, weights):
            logprobs = jax.nn.log_softmax(qwen3_logits(params, config, token_ids, jnp)[:-1])
            return (weights[1:] * logprobs[jnp.arange(LENGTH - 1), token_ids[1:]]).sum()

        return -sum(jax.vmap(summed)(jnp.asarray(token_ids), jnp.asarray(weights))) / weights.sum()

    return loss


def test_the_gradient_is_that_of_the_plain_loss_in_float64(tiny, mesh, qwen3_logits):
    model, params = tiny
    samples = make_samples()
    gradient, metrics = gradient_of(model, params, mesh, packed(samples, 2, 6))
    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params)
        loss = jax.jit(jax.value_and_grad(plain_loss(qwen3_logits, model.config, samples)))
        expected_loss, expected = jax.tree.map(np.asarray, loss(params64))
        assert jax.tree.leaves(expected)[0].dtype == np.float64
    assert metrics["train/loss"] == pytest.approx(float(expected_loss), rel=1e-5)
    assert metrics["train/loss_tokens"] == sum(s.num_copies * s.loss_mask.sum() for s in samples)
    assert metrics["train/grad_norm"] == pytest.approx(float(optax.tree_utils.tree_norm(expected)), rel=1e-4)
    assert_close(gradient, expected, 2e-5)


def test_neither_split_nor_order_nor_empty_rows_change_anything(tiny, mesh):
    model, params = tiny
    samples = make_samples()
    expected, expected_metrics = gradient_of(model, params, mesh, packed(samples, 2, 6))
    shuffled = [samples[i] for i in np.random.default_rng(1).permutation(len(samples))]
    for batch in (packed(shuffled, 2, 6), packed(shuffled, 12, 1)):
        gradient, metrics = gradient_of(model, params, mesh, batch)
        assert_close(gradient, expected, 1e-6)  # the same addends in another order
        assert metrics == pytest.approx(expected_metrics, rel=1e-5)


def optimizer(kind, **changes):
    return make_optimizer(OptimizerConfig(kind=kind, learning_rate=1e-3, **changes), steps=10)


def test_a_gradient_that_is_not_finite_changes_nothing(tiny, mesh):
    """But the count of steps; afterwards training goes on as if the batch had never been."""
    model, params = tiny
    adam = optimizer("adam")
    train_step = make_train_step(model, adam, cross_entropy, mesh)
    good = packed(make_samples(), 2, 6)
    bad = good._replace(loss_weights=np.where(good.loss_weights == 4, np.inf, good.loss_weights).astype(np.float32))
    assert np.isinf(bad.loss_weights).any()

    def run(batches):
        state, skipped = init_state(model, adam, mesh, params), []
        for batch in batches:
            state, metrics = train_step(state, shard_batch(mesh, batch), 1.0)
            skipped.append(float(metrics["train/skipped"]))
        return jax.device_get(state), skipped

    before, _ = run([good])
    after, skipped = run([good, bad])
    assert skipped == [0.0, 1.0]
    assert (before.step, after.step) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])
    going_on, _ = run([good, bad, good])
    never, _ = run([good, good])
    jax.tree.map(np.testing.assert_array_equal, going_on[1:], never[1:])
    assert not np.array_equal(never.params["embed"], before.params["embed"])


def test_schedules():
    def rates(schedule, warmup_steps=0, steps=10):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps, final_fraction=0.1)
        return [float(make_schedule(config, 1.0, steps)(step)) for step in range(steps + 1)]

    assert rates("constant") == [1.0] * 11
    assert rates("constant", 4)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates("linear") == pytest.approx([1 - 0.09 * step for step in range(11)])
    assert rates("cosine", 2) == pytest.approx(
        [1 / 3, 2 / 3, *(0.1 + 0.45 * (1 + math.cos(math.pi * step / 8)) for step in range(9))]
    )


@pytest.mark.slow
def test_many_micro_batches_of_bfloat16_parameters_add_up(tiny_config, random_params, mesh):
    """Sixty-four equal ones: a sum in bfloat16 would stop growing when an addend is less than half its last digit."""
    model = Qwen3(tiny_config(param_dtype="bfloat16"))
    params, sample = random_params(model), make_samples()[0]
    optimizer = optimizer_that_keeps_gradients()
    gradients = []
    for num_micro in (1, 64):
        step = make_train_step(model, optimizer, cross_entropy, mesh)
        batch = packed([sample], 1, 1)
        batch = jax.tree.map(lambda x, num=num_micro: np.repeat(x, num, axis=0), batch)
        state, _ = step(init_state(model, optimizer, mesh, params), shard_batch(mesh, batch), 1.0)
        gradients.append(jax.device_get(state.opt_state))
    # Each addend was rounded to bfloat16 once; dividing by 64 rounds nothing.
    assert_close(gradients[1], jax.tree.map(lambda x: x.astype(np.float64), gradients[0]), 2**-8)


def optimizer_that_keeps_gradients():
    """Its state is the last gradient, in float32."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, params), grads),
    )


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_moments_lie_where_their_parameters_lie(kind):
    """Of the 8B model on eight devices: beside its parameter, and nowhere whole."""
    model, mesh = Qwen3(PUBLISHED["Qwen3-8B"]), AbstractMesh((1, 4, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    rule = optimizer(kind)
    shapes = jax.eval_shape(rule.init, model.abstract_params())
    places = state_shardings(model, rule, mesh)

    def keys(path):
        return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))

    expected = {keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(places.params)}
    moments = 0
    for (path, place), shape in zip(
        jax.tree_util.tree_leaves_with_path(places.opt_state), jax.tree.leaves(shapes), strict=True
    ):
        if shape.size < 10:  # counters, and coefficients of Muon
            assert place.is_fully_replicated
            continue
        moments += shape.size
        [parameter] = [names for names in expected if keys(path)[-len(names) :] == names]
        assert place == expected[parameter], path
    layers = model.abstract_params()["layers"]
    matrices = sum(x.size for name, x in layers.items() if not name.endswith("norm"))
    assert moments == 2 * model.num_params() - (matrices if kind == "muon" else 0)


def test_adafactors_state_is_less_than_a_fiftieth_of_the_parameters():
    """Of the 8B model on eight devices, though its rows and columns lie on every device whole."""
    model, mesh = Qwen3(PUBLISHED["Qwen3-8B"]), AbstractMesh((1, 4, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    state = abstract_state(model, optimizer("adafactor"), mesh)
    params, kept = (
        sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
        for tree in (state.params, state.opt_state)
    )
    assert kept < params / 50


INIT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import AxisType
from jorch.sections import MeshConfig, ModelConfig
from jorch.model.transformer import Qwen3
from jorch.sharding import MESH_AXES, make_mesh

model = Qwen3(ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, head_dim=8))
one = jax.make_mesh((1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1])
mixed = make_mesh(MeshConfig(fsdp=2, tensor=2))
params, expected = (model.init(jax.random.key(0), mesh) for mesh in (mixed, one))
jax.tree.map(np.testing.assert_array_equal, params, expected)
jax.tree.map(lambda x, place: (x.sharding == place) or 1 / 0, params, model.shardings(mixed))
"""


@pytest.mark.slow
def test_initialisation_does_not_depend_on_the_mesh():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", INIT], env=environment, check=True)
