"""Formats, slicing, the hub."""
