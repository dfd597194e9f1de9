"""What is seen of a run: progress, logs, guards, validation."""
