"""Floating-point operations of training a Qwen3, counted from its dimensions: what `plan` and MFU divide by.

A multiply-add is two operations; the backward pass costs twice the forward pass, and once where a matrix is frozen;
recomputation is not counted, and neither are norms, rotary embeddings and softmax. Needs no jax.
"""

from jorch.sections import LoraConfig, ModelConfig

PEAK_FLOPS = {"v5e": 197e12, "v5p": 459e12, "v6e": 918e12, "a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Accelerator -> bfloat16 FLOP/s of one device without sparsity, from the vendors' data sheets."""

_DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""As jax spells them in `device_kind`."""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, None for one that is not in the table (any CPU)."""
    return PEAK_FLOPS.get(_DEVICE_KINDS.get(device_kind, ""))


def matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all but the embedding's rows and the norms' scales."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    layer = D * (N + 2 * K) * H + N * H * D + 3 * D * F
    return config.num_hidden_layers * layer + config.vocab_size * D


def adapter_params(config: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of the adapter: rank x (inputs + outputs) of every target."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    widths = {"q": D + N * H, "k": D + K * H, "v": D + K * H, "o": N * H + D, "gate": D + F, "up": D + F, "down": F + D}
    return config.num_hidden_layers * lora.rank * sum(widths[name] for name in set(lora.targets))


def train_flops(config: ModelConfig, num_tokens: float, num_pairs: float, lora: LoraConfig | None = None) -> float:
    """6 P tokens + 12 L N H pairs, forward and backward (Kaplan et al. 2020, section 2.1; PaLM, appendix B).

    With `lora` (4 P + 6 A) tokens + 12 L N H pairs, where A are the adapter's parameters.

    Args:
        num_pairs: (query, key) pairs that attention computes: T (T + 1) / 2 for a causal row of T tokens, T * T where
            the masked half is counted as if it were computed ("dense equivalent").
    """
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    per_token = 6.0 * matmul_params(config)
    if lora is not None:
        per_token = 4.0 * matmul_params(config) + 6.0 * adapter_params(config, lora)
    return per_token * num_tokens + 12.0 * width * num_pairs
