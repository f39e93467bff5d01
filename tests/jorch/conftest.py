"""What several test files share: one device, a tiny Qwen3, and Qwen3 written down once more in float64."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from jorch.model.transformer import Qwen3
from jorch.sections import MeshConfig, ModelConfig
from jorch.sharding import make_mesh


def _tiny_config(**changes: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100.0,  # turns every pair of a short sequence noticeably
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(sizes | changes))


def _random_params(model: Qwen3, seed: int = 0) -> Any:
    """Parameters that all matter: norms' scales away from 1, branches as strong as the residual stream.

    Drawn by NumPy: compiling the real initialisation takes seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> jax.Array:
        is_norm = path[-1].key.endswith("norm")
        value = rng.uniform(0.7, 1.4, x.shape) if is_norm else rng.normal(0, 0.3, x.shape)
        return jax.numpy.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def _qwen3_logits(params: Any, config: ModelConfig, token_ids: Any, xp: ModuleType = np) -> Any:
    """Logits [n, V] of one sequence in float64 (`xp` may be jax.numpy under x64, to differentiate it).

    Written from the architecture's description: rotary embedding as complex multiplication, attention as a
    loop over heads, no masks but the causal one.
    """
    n, N, K, H = len(token_ids), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    params = jax.tree.map(lambda x: xp.asarray(x, xp.float64), params)

    def norm(x: Any, scale: Any) -> Any:
        return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * scale

    frequencies = config.rope_theta ** (-xp.arange(H // 2) / (H // 2))
    turns = xp.exp(1j * xp.arange(n)[:, None] * frequencies[None, :])

    def rotate(x_nH: Any) -> Any:
        pairs = (x_nH[:, : H // 2] + 1j * x_nH[:, H // 2 :]) * turns
        return xp.concatenate([pairs.real, pairs.imag], axis=-1)

    x = params["embed"][token_ids]
    for index in range(config.num_hidden_layers):
        layer = {name: stacked[index] for name, stacked in params["layers"].items()}
        h = norm(x, layer["attention_norm"])
        for n_ in range(N):
            k_ = n_ // (N // K)
            q_nH = rotate(norm(h @ layer["q"][:, n_], layer["q_norm"]))
            k_nH = rotate(norm(h @ layer["k"][:, k_], layer["k_norm"]))
            scores = xp.where(xp.tri(n, dtype=bool), q_nH @ k_nH.T / xp.sqrt(H), -xp.inf)
            weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
            o_nH = weights / weights.sum(axis=-1, keepdims=True) @ (h @ layer["v"][:, k_])
            x = x + o_nH @ layer["o"][n_]
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + xp.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    unembed = params["embed"] if config.tie_word_embeddings else params["unembed"]
    return norm(x, params["final_norm"]) @ unembed.T


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    return _tiny_config


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    return _random_params


@pytest.fixture(scope="session")
def qwen3_logits() -> Callable[..., Any]:
    return _qwen3_logits


@pytest.fixture(scope="session")
def mesh() -> Any:
    return make_mesh(MeshConfig())


@pytest.fixture(scope="session")
def tiny() -> tuple[Qwen3, Any]:
    """A tiny tied model and its parameters; nobody may donate them."""
    model = Qwen3(_tiny_config())
    return model, _random_params(model)


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """For files whose time is XLA's: it leaves out most optimisations, which oracles within a tolerance do not need."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
