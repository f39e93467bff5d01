"""The Qwen3 decoder layer. Parameters carry their logical axes, from which `sharding.py` places them.

Letters: B rows, T positions, D model, F MLP, N query heads, K key-value heads, H head dim, R rank of an adapter.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jorch.sections import LoraConfig, ModelConfig

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q_BTNH, k_BTKH, v_BTKH) -> o_BTNH; training and decoding differ only here."""


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, dtype: str) -> nnx.Param:
    """A normal-initialised parameter (std 0: ones, the start of a norm's scale)."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32) if std else jnp.ones(shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, dtype: str | None = None) -> jax.Array:
    """RMSNorm over the last axis, statistics in float32; the result in `dtype`, of x if None."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    rounded_to = dtype or x.dtype
    return scale.astype(rounded_to) * normed.astype(rounded_to)


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


class LowRank(nnx.Module):
    """x A B, scaled: what LoRA adds to the product of x with one matrix. A [in..., R] is random and B [R, out...] zero,
    so that training starts at the frozen model; both are float32, as small updates would round away."""

    def __init__(self, weight: nnx.Param, num_inputs: int, lora: LoraConfig, *, rngs: nnx.Rngs) -> None:
        shape, axes = weight.shape, weight.get_metadata("axes")
        inputs, outputs = shape[:num_inputs], shape[num_inputs:]
        a = math.prod(inputs) ** -0.5 * jax.random.normal(rngs.params(), (*inputs, lora.rank), jnp.float32)
        self.a = nnx.LoRAParam(a, axes=(*axes[:num_inputs], "rank"))
        self.b = nnx.LoRAParam(jnp.zeros((lora.rank, *outputs), jnp.float32), axes=("rank", *axes[num_inputs:]))
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        return self.scale * jnp.tensordot(jnp.tensordot(x, a, a.ndim - 1), b, 1)


class Adapter(nnx.Module):
    """The `LowRank` of each target of a layer, under the target's name."""

    def __init__(self, block: "Block", lora: LoraConfig, *, rngs: nnx.Rngs) -> None:
        for name in sorted(set(lora.targets)):
            setattr(self, name, LowRank(getattr(block, name), 2 if name == "o" else 1, lora, rngs=rngs))

    def of(self, name: str) -> LowRank | None:
        return getattr(self, name, None)


class Block(nnx.Module):
    """Pre-norm attention with QK-norm, then a SwiGLU MLP. With `lora`, an adapter beside the matrices."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs) -> None:
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
        self.adapter = Adapter(self, lora, rngs=rngs) if lora else None

    def __call__(self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> jax.Array:
        h_BTD = rms_norm(x_BTD, self.attention_norm[...], self.eps)
        q_BTNH = self._multiply("btd,dnh->btnh", h_BTD, "q")
        k_BTKH = self._multiply("btd,dkh->btkh", h_BTD, "k")
        v_BTKH = self._multiply("btd,dkh->btkh", h_BTD, "v")
        q_BTNH = apply_rope(rms_norm(q_BTNH, self.q_norm[...], self.eps), rope)
        k_BTKH = apply_rope(rms_norm(k_BTKH, self.k_norm[...], self.eps), rope)
        o_BTNH = attend(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = x_BTD + self._multiply("btnh,nhd->btd", o_BTNH, "o")
        h_BTD = rms_norm(x_BTD, self.mlp_norm[...], self.eps)
        g_BTF = self._multiply("btd,df->btf", h_BTD, "gate")
        u_BTF = self._multiply("btd,df->btf", h_BTD, "up")
        return x_BTD + self._multiply("btf,fd->btd", jax.nn.silu(g_BTF) * u_BTF, "down")

    def _multiply(self, equation: str, x: jax.Array, name: str) -> jax.Array:
        y = jnp.einsum(equation, x, getattr(self, name)[...].astype(x.dtype))
        added = self.adapter.of(name) if self.adapter else None
        return y if added is None else y + added(x)
