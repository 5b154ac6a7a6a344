"""Differences with their errors, over prompts and seeds."""
