"""One training step: state, gradients, update."""
