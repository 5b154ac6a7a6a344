"""Answers of a model: prompts as token ids in, tokens out, by one of several backends (docs/generation.md)."""
