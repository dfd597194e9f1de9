"""A run's folder: lock, checkpoints, stop signals."""
