"""Training: config, data, loop; many processes."""
