"""Floating-point operations of training a Qwen3, counted from its dimensions: what `plan` and MFU divide by.

A multiply-add is two operations; the backward pass costs twice the forward pass; recomputation is not counted, and
neither are norms, rotary embeddings and softmax. Needs no jax.
"""

from jorch.config import ModelConfig


def matmul_params(config: ModelConfig) -> int:
    """Parameters that multiply every token: all but the embedding's rows and the norms' scales."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    layer = D * (N + 2 * K) * H + N * H * D + 3 * D * F
    return config.num_hidden_layers * layer + config.vocab_size * D


def train_flops(config: ModelConfig, num_tokens: float, num_pairs: float) -> float:
    """6 P tokens + 12 L N H pairs, forward and backward (Kaplan et al. 2020, section 2.1; PaLM, appendix B).

    Args:
        num_pairs: (query, key) pairs that attention computes: T (T + 1) / 2 for a causal row of T tokens, T * T where
            the masked half is counted as if it were computed ("dense equivalent").
    """
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * matmul_params(config) * num_tokens + 12.0 * width * num_pairs
