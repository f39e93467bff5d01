"""Update rules beside the same rules written down in float64, and what their states are kept in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jorch.sections import OptimizerConfig
from jorch.train.optimizer import make_optimizer

RATE, DECAY, CLIP, STEPS = 0.1, 0.2, 3.0, 4
SHAPES = {"matrix": (2, 128, 160), "norm": (2, 40)}


def run(config, params, gradients):
    """(parameters, optimizer state) after one update a gradient."""
    optimizer = make_optimizer(config, STEPS)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = update(params, state, grads)
    return params, state


def draw(dtype="float32"):
    rng = np.random.default_rng(0)

    def tree():
        return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}

    return tree(), [tree() for _ in range(STEPS)]


def config_of(kind, **changes):
    settings = {"learning_rate": RATE, "weight_decay": DECAY, "clip_norm": CLIP, "beta1": 0.9, "beta2": 0.99}
    return OptimizerConfig(kind=kind, **(settings | changes))


def in_float64(tree):
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def clipped(grads):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > CLIP, "nothing is clipped"
    return {name: g * CLIP / norm for name, g in grads.items()}


def adam(params, gradients):
    """AdamW (Loshchilov and Hutter 2017, algorithm 2)."""
    mean, square = ({name: np.zeros(x.shape) for name, x in params.items()} for _ in range(2))
    for t, grads in enumerate(map(clipped, gradients), 1):
        for name, g in grads.items():
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.99 * square[name] + 0.01 * g * g
            step = mean[name] / (1 - 0.9**t) / (np.sqrt(square[name] / (1 - 0.99**t)) + 1e-8)
            params[name] = params[name] - RATE * (step + DECAY * params[name])
    return params


def adafactor(params, gradients):
    """Shazeer and Stern 2018, algorithms 4 and 5, with an absolute rate; for a layer's matrix at a time."""
    rows, columns = np.zeros((2, 128)), np.zeros((2, 160))
    square = np.zeros(SHAPES["norm"])
    for t, grads in enumerate(map(clipped, gradients), 1):
        decay = 1 - t**-0.8
        g = grads["matrix"]
        rows = decay * rows + (1 - decay) * (g * g).mean(2)
        columns = decay * columns + (1 - decay) * (g * g).mean(1)
        factored = rows[:, :, None] * columns[:, None, :] / rows.mean(1)[:, None, None]
        square = decay * square + (1 - decay) * grads["norm"] ** 2
        for name, estimate in (("matrix", factored), ("norm", square)):
            step = grads[name] / np.sqrt(estimate)
            step = step / max(1.0, np.sqrt((step**2).mean()))
            params[name] = params[name] - RATE * (step + DECAY * params[name])
    return params


@pytest.mark.parametrize(("kind", "oracle"), [("adam", adam), ("adafactor", adafactor)])
def test_updates_equal_the_rule_in_float64(kind, oracle):
    params, gradients = draw()
    got, _ = run(config_of(kind), params, gradients)
    expected = oracle(in_float64(params), [in_float64(grads) for grads in gradients])
    for name in SHAPES:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5)  # steps of 0.1 in float32


def test_bfloat16_first_moments_follow_float32_ones():
    params, gradients = draw()
    (whole, _), (half, state) = (
        run(config_of("adam", moment_dtype=d), params, gradients) for d in ("float32", "bfloat16")
    )
    kept = {str(x.dtype): x.size for x in jax.tree.leaves(state) if x.ndim > 1}
    assert kept.keys() == {"float32", "bfloat16"}
    for name in SHAPES:
        # Each step of about 0.1 has 8 bits.
        np.testing.assert_allclose(half[name], whole[name], rtol=0, atol=STEPS * RATE * 2**-7)
        assert not np.array_equal(half[name], whole[name])


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_second_moments_of_bfloat16_parameters_fade(kind):
    """In bfloat16 0.999 x is x: one large gradient would be remembered for ever."""
    params = {"norm": jnp.ones((4, 4), jnp.bfloat16)}
    gradients = [{"norm": jnp.full((4, 4), g, jnp.bfloat16)} for g in [0.5] + 20 * [0.0]]
    got, state = run(config_of(kind, beta2=0.999, weight_decay=0.0), params, gradients)
    assert got["norm"].dtype == jnp.bfloat16
    [nu] = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state) if "nu" in jax.tree_util.keystr(path) and x.ndim
    ]
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, 0.001 * 0.25 * 0.999**20, rtol=1e-4)


def test_adafactor_keeps_hardly_anything():
    """A number a row and a number a column, and of what is not factored, a number each."""
    params, _ = draw()
    state = make_optimizer(config_of("adafactor"), STEPS).init(params)
    kept = sum(x.size for x in jax.tree.leaves(state))
    assert kept - 2 * (128 + 160) - 2 * 40 < 20
