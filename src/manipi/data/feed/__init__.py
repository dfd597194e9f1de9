"""Samples from datasets to batches: order, workers, cache, mixtures."""
