"""Packed and rollout-tree attention."""
