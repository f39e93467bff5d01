"""Attention of newly sampled tokens over a cache of keys and values."""
