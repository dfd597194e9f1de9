"""Norm stats: what they are computed from, computed, merged, drawn."""
