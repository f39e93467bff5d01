"""Checkpoints to Hugging Face safetensors."""
