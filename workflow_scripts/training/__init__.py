"""What the trainers share: checkpoints, the held-out objective, its change."""
