"""Complete training configs, one function each; see `manipi.recipes.registry`."""
