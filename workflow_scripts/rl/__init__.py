"""Rewards, reward models, and PPO."""
