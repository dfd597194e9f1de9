"""The same network rearranged for inference: fused and quantised weights, static cache, captured graphs."""
