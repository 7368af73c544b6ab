"""A run's folder: complete checkpoints, read on any number of ranks."""
