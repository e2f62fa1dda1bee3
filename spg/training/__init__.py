"""Reinforcement learning of a policy, one run at a time."""
