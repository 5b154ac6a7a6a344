"""The page: what is better, by how much, and whether that can be told."""
