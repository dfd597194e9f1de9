"""Checkpoints of other projects in and out: whole policies, where `manipi.checkpoints` knows weights alone."""
