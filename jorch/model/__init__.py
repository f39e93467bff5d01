"""The Qwen3 decoder in Flax NNX: layers, attention, transformer, KV-cache decode."""
