"""Our checkpoints: written, verified, read, and the weights to go on from."""
