"""The Qwen3 decoder layer. Parameters carry their logical axes, from which `sharding.py` places them.

Letters: B rows, T positions, D model, F MLP, N query heads, K key-value heads, H head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jorch.config import ModelConfig

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q_BTNH, k_BTKH, v_BTKH) -> o_BTNH; training and decoding differ only here."""


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, dtype: str) -> nnx.Param:
    """A normal-initialised parameter (std 0: ones, the start of a norm's scale)."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32) if std else jnp.ones(shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * normed.astype(x.dtype)


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, f32[B, T, 1, H/2], of the rotary angles."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of each head against each other (Hugging Face's layout)."""
    cos, sin = (table.astype(x_BTNH.dtype) for table in rope)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Block(nnx.Module):
    """Pre-norm attention with QK-norm, then a SwiGLU MLP."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
        N, K, dtype = config.num_attention_heads, config.num_key_value_heads, config.param_dtype
        # Residual branches start small, so that depth does not scale the variance (GPT-2).
        out_scale = (2 * config.num_hidden_layers) ** -0.5
        self.eps = config.rms_norm_eps
        self.attention_norm = param(rngs, (D,), ("embed",), 0, dtype)
        self.q = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), D**-0.5, dtype)
        self.k = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5, dtype)
        self.v = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5, dtype)
        self.o = param(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_scale * (N * H) ** -0.5, dtype)
        self.q_norm = param(rngs, (H,), ("head_dim",), 0, dtype)
        self.k_norm = param(rngs, (H,), ("head_dim",), 0, dtype)
        self.mlp_norm = param(rngs, (D,), ("embed",), 0, dtype)
        self.gate = param(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.up = param(rngs, (D, F), ("embed", "mlp"), D**-0.5, dtype)
        self.down = param(rngs, (F, D), ("mlp", "embed"), out_scale * F**-0.5, dtype)

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        dtype = x_BTD.dtype
        h_BTD = rms_norm(x_BTD, self.attention_norm[...], self.eps)
        q_BTNH = jnp.einsum("btd,dnh->btnh", h_BTD, self.q[...].astype(dtype))
        k_BTKH = jnp.einsum("btd,dkh->btkh", h_BTD, self.k[...].astype(dtype))
        v_BTKH = jnp.einsum("btd,dkh->btkh", h_BTD, self.v[...].astype(dtype))
        q_BTNH = apply_rope(rms_norm(q_BTNH, self.q_norm[...], self.eps), rope)
        k_BTKH = apply_rope(rms_norm(k_BTKH, self.k_norm[...], self.eps), rope)
        o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", o_BTNH, self.o[...].astype(dtype))
        h_BTD = rms_norm(x_BTD, self.mlp_norm[...], self.eps)
        g_BTF = jnp.einsum("btd,df->btf", h_BTD, self.gate[...].astype(dtype))
        u_BTF = jnp.einsum("btd,df->btf", h_BTD, self.up[...].astype(dtype))
        return x_BTD + jnp.einsum("btf,fd->btd", jax.nn.silu(g_BTF) * u_BTF, self.down[...].astype(dtype))
