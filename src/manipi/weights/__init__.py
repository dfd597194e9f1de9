"""Tensors in the files of others: names, stores, layouts."""
