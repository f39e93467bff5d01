"""The dense Qwen3 models as their authors publish them: what every size that jorch names must agree with.

Dimensions are those of `config.json` in Qwen/Qwen3-SIZE on Hugging Face (transformers 4.51), numbers of parameters in
billions those of the model cards there ("Number of Parameters", "Number of Paramaters (Non-Embedding)"). Read in copies,
November 2026: config.json of 4B, 8B, 14B and 32B whole in sglang/Model_Config.md of
citsjtu2020/LLM-Prof at 8434c8d; those of 0.6B and 1.7B with heads, layers, widths and theta in
src/maxtext/configs/models/qwen3-*.yml of AI-Hypercomputer/maxtext. Exact totals, which hold all dimensions
together, are those of keras_hub/src/models/qwen3/qwen3_presets.py of keras-team/keras-hub at 1df65da.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One size."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    num_params: int
    """A tied head counts once."""
    billions: float
    """The card's."""
    billions_without_embedding: float
    """The card's; neither embedding nor unembedding."""


SIZES = {
    "Qwen3-0.6B": Published(1024, 3072, 28, 16, True, 596_049_920, 0.6, 0.44),
    "Qwen3-1.7B": Published(2048, 6144, 28, 16, True, 1_720_574_976, 1.7, 1.4),
    "Qwen3-4B": Published(2560, 9728, 36, 32, True, 4_022_468_096, 4.0, 3.6),
    "Qwen3-8B": Published(4096, 12288, 36, 32, False, 8_190_735_360, 8.2, 6.95),
    "Qwen3-14B": Published(5120, 17408, 40, 40, False, 14_768_307_200, 14.8, 13.2),
    "Qwen3-32B": Published(5120, 25600, 64, 64, False, 32_762_123_264, 32.8, 31.2),
}


def config_json(size: str) -> dict[str, object]:
    """The keys of `config.json` that make the architecture."""
    published = SIZES[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": published.hidden_size,
        "intermediate_size": published.intermediate_size,
        "max_position_embeddings": 40960,
        "max_window_layers": published.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": published.num_attention_heads,
        "num_hidden_layers": published.num_hidden_layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": published.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
