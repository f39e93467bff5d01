"""Tokenizer, chat format, task files and packing."""
