"""The last import of the fork server: a collection in a fork would copy all pages of what was imported before."""

import gc

import tyro

tyro.cli(int, args=["0"], prog="manipi")  # imports what reading a command line needs
gc.collect()
gc.freeze()
