"""RLDS datasets, as DROID and Open X-Embodiment are published, without TensorFlow."""
