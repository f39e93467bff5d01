"""Reinforcement learning: rewards, advantages, samples, losses and the loop."""
