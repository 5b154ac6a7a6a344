"""The tiny world: instructions, answers, its base."""
